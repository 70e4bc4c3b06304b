//! The limit of open files: every blob, cache file and memory region of a guest is one.

use std::fs;

use tracing::info;

use super::DaemonError;
use crate::limits::SPARED_OPEN_FILES;
use crate::sys::machine::raise_open_files;

/// Raises the limit to `wanted`, at most `fs.file-max` less [`SPARED_OPEN_FILES`], never below what it is. Where the
/// process may not raise it that far it is raised as far as possible, and the log says so.
///
/// # Errors
/// [`DaemonError::FewFiles`] when the whole machine may open too few.
pub fn raise(wanted: u64) -> Result<(), DaemonError> {
    let text = fs::read_to_string("/proc/sys/fs/file-max").ok();
    // Not readable (no /proc): the kernel still refuses what is too much.
    let machine = text.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
    let wanted = within(wanted, machine)?;
    let in_force = raise_open_files(Some(wanted));
    if in_force < wanted {
        info!("limit of open files is {in_force}: without CAP_SYS_RESOURCE it cannot be raised to {wanted}");
    }
    Ok(())
}

fn within(wanted: u64, machine: u64) -> Result<u64, DaemonError> {
    if machine < SPARED_OPEN_FILES.saturating_mul(2) {
        return Err(DaemonError::FewFiles { machine });
    }
    Ok(wanted.min(machine - SPARED_OPEN_FILES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wish_is_lowered_to_what_the_machine_spares() {
        assert_eq!(within(1_000_000, u64::MAX).unwrap(), 1_000_000);
        assert_eq!(within(1_000_000, 100_000).unwrap(), 83_616);
        assert_eq!(within(1000, 32768).unwrap(), 1000);
        assert!(matches!(within(1000, 32767), Err(DaemonError::FewFiles { machine: 32767 })));
    }
}
