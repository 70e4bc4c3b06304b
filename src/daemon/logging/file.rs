//! The log file, put aside by size: `name_<time>.log`, compressed in the background, the newest kept.

use std::ffi::OsStr;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::Instant;
use crate::limits::KEPT_LOG_FILES;

/// The file that lines are appended to.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    rotate_bytes: u64,
}

impl LogFile {
    /// Appends to `path`, to which ".log" is added when it has no extension; `rotate_bytes` 0: never put aside.
    pub(super) fn open(path: &Path, rotate_bytes: u64) -> io::Result<Self> {
        let mut path = path.to_owned();
        if path.extension().is_none() {
            path.set_extension("log");
        }
        let file = append(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open {}: {error}", path.display())))?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, rotate_bytes })
    }

    /// Appends a whole line.
    pub(super) fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.rotate_bytes > 0 && self.bytes > 0 && self.bytes + line.len() as u64 > self.rotate_bytes {
            // A log that cannot be put aside grows: better than one that is lost.
            let _ = self.put_aside();
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn put_aside(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let stem = self.path.file_stem().unwrap_or(OsStr::new("log")).to_string_lossy().into_owned();
        let name = format!(
            "{stem}_{:04}-{:02}-{:02}_{:02}-{:02}-{:02}-{:06}.log",
            now.year, now.month, now.day, now.hour, now.minute, now.second, now.micros
        );
        let aside = self.path.with_file_name(name);
        fs::rename(&self.path, &aside)?;
        self.file = append(&self.path)?;
        self.bytes = 0;
        // Without a thread the file stays as it is, uncompressed.
        let _ = std::thread::Builder::new().name("log-rotate".to_owned()).spawn(move || {
            let _ = compress(&aside);
            let _ = prune(&aside, &stem);
        });
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

fn compress(path: &Path) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".gz");
    let target = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&name)?;
    let mut encoder = GzEncoder::new(target, Compression::default());
    io::copy(&mut File::open(path)?, &mut encoder)?;
    encoder.finish()?;
    fs::remove_file(path)
}

/// Removes all but the newest files that were put aside; the time in their names sorts them.
fn prune(aside: &Path, stem: &str) -> io::Result<()> {
    let directory = aside.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!("{stem}_");
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let time = name.strip_prefix(&prefix).and_then(|rest| rest.split_once(".log"));
        time.is_some_and(|(time, end)| is_time(time) && (end.is_empty() || end == ".gz"))
    };
    let entries = fs::read_dir(directory)?.filter_map(Result::ok).map(|entry| entry.path());
    let mut old: Vec<PathBuf> = entries.filter(is_ours).collect();
    old.sort();
    for path in old.iter().rev().skip(KEPT_LOG_FILES) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn is_time(text: &str) -> bool {
    text.len() == "2026-11-23_15-49-45-239071".len()
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn file_is_put_aside_compressed_and_pruned() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("nydusd_other.log"), "not ours").unwrap();
        let mut log = LogFile::open(&directory.path().join("nydusd"), 100).unwrap();
        for n in 0..KEPT_LOG_FILES + 5 {
            log.write_line(format!("{n:059}\n").as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        let expected = KEPT_LOG_FILES + 2;
        let names = || -> Vec<String> {
            let entries = fs::read_dir(directory.path()).unwrap();
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
        };
        // Compression runs beside us: wait for it, with a bound that only a broken program meets.
        for _ in 0..2000 {
            let now = names();
            if now.len() == expected && now.iter().filter(|name| name.ends_with(".gz")).count() == KEPT_LOG_FILES {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let now = names();
        assert_eq!(now.len(), expected, "{now:?}");
        assert!(now.contains(&"nydusd.log".to_owned()) && now.contains(&"nydusd_other.log".to_owned()), "{now:?}");
        let last = format!("{:059}\n", KEPT_LOG_FILES + 4);
        assert_eq!(fs::read_to_string(directory.path().join("nydusd.log")).unwrap(), last);
    }

    #[test]
    fn extension_is_kept_and_size_zero_never_rotates() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.txt");
        let mut log = LogFile::open(&path, 0).unwrap();
        for _ in 0..100 {
            log.write_line(&[b'a'; 100]).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 10_000);
        let missing = LogFile::open(&directory.path().join("no/where"), 0).unwrap_err().to_string();
        assert!(missing.contains("no/where.log"), "{missing}");
    }
}
