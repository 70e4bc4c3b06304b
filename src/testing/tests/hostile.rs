//! Images that somebody made to hurt, against `nydus-image check` and against the daemon, each as a process.

use std::collections::HashSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::testing::error::HarnessError;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::hostile;
use nydus_vm::testing::hostile::Case;
use nydus_vm::testing::hostile::Specimen;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::process::DaemonProcess;

use crate::support;
use crate::support::SMALL;

/// Longest time for one image, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(10);
/// Memory that a check may map, and that a daemon may have resident at its peak: bombs are larger.
const MEMORY_BYTES: u64 = 256 << 20;
/// The same for a daemon whose image claims all that the format can express: a word per 512 chunks
/// (`limits::MAX_V6_DEVICES` times `limits::MAX_CHUNKS_PER_BLOB`), and what else each open blob needs.
const LARGEST_CLAIM_BYTES: u64 = 1 << 30;
/// Directories that are looked at in one image: a specimen has five.
const MAX_NODES: usize = 2000;

/// Errors with which a daemon may answer for what is damaged.
const ALLOWED: [i32; 4] = [libc::EIO, libc::ENOENT, libc::ENODATA, libc::ENOSYS];

/// Runs `nydus-image check` on an image, with its memory bounded; exit code and what it says on stderr.
fn check(image: &TestImage) -> (Option<i32>, String) {
    check_within(MEMORY_BYTES, image)
}

fn check_within(bytes: u64, image: &TestImage) -> (Option<i32>, String) {
    let start = Instant::now();
    let mut command = Command::new("/bin/sh");
    let limit = bytes / 1024;
    command.arg("-c").arg(format!("ulimit -v {limit} && exec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(["check", "--log-level", "error", "--data", "-B"]).arg(&image.bootstrap).arg("-D").arg(&image.blobs);
    let output = command.stdin(Stdio::null()).process_group(0).output().unwrap();
    assert!(start.elapsed() < PATIENCE, "it took {:?}", start.elapsed());
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// What is wrong with the outcome of a check.
fn fault_of_check(case: &Case, home: &Path) -> Option<String> {
    let (code, text) = check(&case.specimen.write(home));
    let names = |line: &str| {
        let has_field = |field: &&str| match *field {
            "offset" => line.contains(" at offset 0x"),
            field => {
                line.contains(&format!(": {field} at offset 0x"))
                    || line.contains(&format!(": {field}")) && line.contains("can be read by")
            }
        };
        let path = line.split(" of /").nth(1).map(|rest| format!("/{}", rest.split(": ").next().unwrap_or_default()));
        case.fields.iter().any(has_field) && path.as_deref().unwrap_or_default().starts_with(case.path)
    };
    if code == Some(1) && text.lines().any(names) && !text.contains("panicked") {
        return None;
    }
    let head: Vec<_> = text.lines().take(4).collect();
    Some(format!("{}: code {code:?}, expected {:?} of {:?}: {}", case.name, case.fields, case.path, head.join(" | ")))
}

#[test]
fn check_names_field_offset_and_path_of_every_case() {
    let home = tempfile::tempdir().unwrap();
    for good in [Specimen::v6(), Specimen::v5()] {
        let (code, text) = check(&good.write(home.path()));
        assert_eq!((code, text.as_str()), (Some(0), ""), "the good image");
    }
    let cases = hostile::corpus();
    assert!(cases.len() > 200, "{} cases", cases.len());
    let faults: Vec<_> = cases.iter().filter_map(|case| fault_of_check(case, home.path())).collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

/// Starts a daemon on an image; `Err` has what it says when it refuses.
fn start(image: &TestImage, home: &Path) -> Result<DaemonProcess, String> {
    let cache = home.join("cache");
    // Nothing of the case before.
    let _ = fs::remove_dir_all(&cache);
    fs::create_dir_all(&cache).unwrap();
    let _ = fs::remove_file(home.join("log"));
    fs::write(home.join("config.json"), image.config(&cache).to_string()).unwrap();
    let socket = support::socket(home);
    let _ = fs::remove_file(&socket);
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command.arg("--config").arg(home.join("config.json")).arg("--bootstrap").arg(&image.bootstrap);
    command.arg("--sock").arg(&socket).args(["--log-level", "error", "--rlimit-nofile", "0"]);
    let begin = Instant::now();
    let outcome = DaemonProcess::start(command, &socket, &home.join("log"));
    assert!(begin.elapsed() < PATIENCE, "the start took {:?}", begin.elapsed());
    outcome.map_err(|_| fs::read_to_string(home.join("log")).unwrap_or_default())
}

/// Asks for everything below the root, and believes nothing.
fn explore(guest: &mut Guest) -> Result<(), String> {
    let (mut pending, mut seen) = (vec![1u64], HashSet::new());
    let begin = Instant::now();
    while let Some(node) = pending.pop() {
        // Names may lead in a circle.
        if !seen.insert(node) {
            continue;
        }
        if seen.len() > MAX_NODES || begin.elapsed() > PATIENCE {
            return Err(format!("{} inodes in {:?}", seen.len(), begin.elapsed()));
        }
        let mut ask = |request: &Request| {
            let reply = guest.call(request).map_err(|error| error.to_string())?;
            match reply.errno {
                0 => Ok(Some(reply.body)),
                errno if ALLOWED.contains(&errno) => Ok(None),
                errno => Err(format!("errno {errno} for {request:?}")),
            }
        };
        ask(&Request::getattr(node))?;
        ask(&Request::listxattr(node, 4096))?;
        ask(&Request::getxattr(node, b"user.aa", 4096))?;
        let mut offset = 0;
        for _ in 0..200 {
            let Some(body) = ask_directory(&mut ask, node, offset)? else { break };
            let entries = directory_entries(&body, Listing::Plus).map_err(|error| error.to_string())?;
            let Some(last) = entries.last() else { break };
            offset = last.next;
            let named = entries.iter().filter(|entry| !matches!(entry.name.as_slice(), b"." | b".."));
            for entry in named.filter_map(|entry| entry.entry.as_ref()).filter(|entry| entry.node != 0) {
                match entry.attributes.mode & 0o170000 {
                    0o040000 => pending.push(entry.node),
                    0o120000 => drop(ask(&Request::readlink(entry.node))?),
                    0o100000 => read(&mut ask, entry)?,
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

type Ask<'a> = dyn FnMut(&Request) -> Result<Option<Vec<u8>>, String> + 'a;

fn ask_directory(ask: &mut Ask<'_>, node: u64, offset: u64) -> Result<Option<Vec<u8>>, String> {
    ask(&Request::readdirplus(node, 0, offset, 16 << 10))
}

/// The start, the middle and the end of a file, whatever its size.
fn read(ask: &mut Ask<'_>, entry: &EntryReply) -> Result<(), String> {
    let size = entry.attributes.size;
    if size == 0 {
        return Ok(());
    }
    for offset in [0, size / 2, size.saturating_sub(1)] {
        ask(&Request::read(entry.node, 0, offset, 16 << 10))?;
    }
    ask(&Request::lseek(entry.node, 0, 0, 4)).map(drop)
}

/// The content of a file.
fn content(guest: &mut Guest, path: &str) -> Result<Vec<u8>, HarnessError> {
    let mut node = 1;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let body = guest.call(&Request::lookup(node, name.as_bytes()))?.body()?;
        node = EntryReply::from_lookup(&body)?.node;
    }
    let mut bytes = Vec::new();
    loop {
        let more = guest.call(&Request::read(node, 0, bytes.len() as u64, 16 << 10))?.body()?;
        if more.is_empty() {
            return Ok(bytes);
        }
        bytes.extend(more);
    }
}

/// Largest memory of a process so far.
fn peak_bytes(daemon: &DaemonProcess) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// What is wrong with how a daemon bears an image.
fn fault_of_daemon(case: &Case, home: &Path) -> Option<String> {
    let fault = |what: String| Some(format!("{}: {what}", case.name));
    let image = case.specimen.write(home);
    let mut daemon = match start(&image, home) {
        Ok(daemon) => daemon,
        Err(told) if told.contains("panicked") => return fault(told),
        // One line that names the file.
        Err(told) if told.lines().count() == 1 && told.starts_with("Error: ") && told.contains("bootstrap") => {
            return None;
        }
        Err(told) if told.lines().count() == 1 && told.contains(&case.specimen.blob_id) => return None,
        Err(told) => return fault(format!("the start says {told:?}")),
    };
    let options = GuestOptions { reply_bytes: 32 << 10, ..SMALL };
    let mut guest = match Guest::boot(&support::socket(home), &options) {
        Ok(guest) => guest,
        Err(error) => return fault(format!("{error}: {}", daemon.log())),
    };
    if let Err(what) = explore(&mut guest) {
        return fault(what);
    }
    for path in case.spared {
        match content(&mut guest, path) {
            Ok(bytes) if bytes == hostile::content(path) => {}
            Ok(bytes) => return fault(format!("{path} has other bytes, {}", bytes.len())),
            Err(error) => return fault(format!("{path}: {error}")),
        }
    }
    if !daemon.is_running().unwrap() || daemon.log().contains("panicked") {
        return fault(format!("the daemon: {}", daemon.log()));
    }
    let peak = peak_bytes(&daemon);
    (peak > MEMORY_BYTES).then(|| format!("{}: {peak} bytes at the peak", case.name))
}

#[test]
fn daemon_bears_every_case_and_serves_what_is_not_affected() {
    let home = tempfile::tempdir().unwrap();
    let good =
        Case { name: "good".into(), specimen: Specimen::v5(), fields: &[], path: "", spared: &["/big", "/text"] };
    assert_eq!(fault_of_daemon(&good, home.path()), None);
    let cases = hostile::corpus();
    let faults: Vec<_> = cases.iter().filter_map(|case| fault_of_daemon(case, home.path())).collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

/// 100 KiB of metadata claim 254 blobs of 16 TiB with 2^24 chunks each: what they claim must not become memory.
#[test]
fn daemon_and_check_bear_the_largest_claims() {
    let home = tempfile::tempdir().unwrap();
    let image = hostile::many::v6().write(home.path());
    let (code, text) = check_within(LARGEST_CLAIM_BYTES, &image);
    assert_eq!(code, Some(1), "{text}");
    assert_eq!(text.lines().filter(|line| line.contains("blob file at offset 0x0")).count(), 254, "{text}");
    for (id, bytes) in hostile::many::blobs() {
        fs::File::create(image.blobs.join(id)).and_then(|file| file.set_len(bytes)).unwrap();
    }
    let (code, text) = check_within(LARGEST_CLAIM_BYTES, &image);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.lines().filter(|line| line.contains(": CI at offset 0x8000000000: ")).count() == 254, "{text}");
    match start(&image, home.path()) {
        Ok(daemon) => {
            let mut guest = Guest::boot(&support::socket(home.path()), &SMALL).unwrap();
            explore(&mut guest).unwrap();
            let peak = peak_bytes(&daemon);
            assert!(peak <= LARGEST_CLAIM_BYTES, "{peak} bytes at the peak");
        }
        // Where the cache cannot hold files of this size.
        Err(told) => assert!(told.lines().count() == 1 && told.starts_with("Error: "), "{told}"),
    }
}
