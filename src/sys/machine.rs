//! Facts about this machine and process: boot id, memory, limits.

use std::fs;
use std::io;

/// The kernel's id of this boot, 16 bytes: changes with every boot of the machine.
///
/// # Errors
/// What reading `/proc/sys/kernel/random/boot_id` answers; `InvalidData` when it is not a UUID.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex_digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let mut id = [0; 16];
    hex::decode_to_slice(hex_digits, &mut id).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(id)
}

/// Private memory of a process in bytes: anonymous plus private dirty pages (`smaps_rollup`).
///
/// # Errors
/// What reading `/proc/<pid>/smaps_rollup` answers.
pub fn private_bytes(pid: u32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    Ok(text.lines().filter(|l| l.starts_with("Private_Dirty:")).filter_map(kib).sum::<u64>() * 1024)
}

/// Raises the limit of open files as far as `wanted` or the hard limit allows, and returns what is in force.
/// `None`: leave it alone.
pub fn raise_open_files(wanted: Option<u64>) -> u64 {
    use rustix::process::Resource;
    use rustix::process::Rlimit;
    let old = rustix::process::getrlimit(Resource::Nofile);
    let current = old.current.unwrap_or(u64::MAX);
    let Some(wanted) = wanted.filter(|wanted| *wanted > current) else { return current };
    let both = Rlimit { current: Some(wanted), maximum: Some(wanted.max(old.maximum.unwrap_or(u64::MAX))) };
    if rustix::process::setrlimit(Resource::Nofile, both).is_ok() {
        return wanted;
    }
    let lowered = old.maximum.map_or(wanted, |maximum| wanted.min(maximum));
    let soft = Rlimit { current: Some(lowered), maximum: old.maximum };
    match rustix::process::setrlimit(Resource::Nofile, soft) {
        Ok(()) => lowered,
        Err(_) => current,
    }
}
