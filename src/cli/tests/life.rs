//! Start, serving, and the end, of a daemon as a process.

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::process::DaemonProcess;
use rustix::process::Signal;

use crate::place::GREETING;
use crate::place::Place;
use crate::place::greeting;
use crate::place::names;

/// What a daemon may take from SIGTERM to its end (`limits::SHUTDOWN`).
const END: Duration = Duration::from_secs(1);

/// Long enough that only a broken daemon meets it.
const PATIENCE: Duration = Duration::from_secs(20);

fn end(daemon: &mut DaemonProcess, signal: Signal) {
    let start = Instant::now();
    daemon.signal(signal).unwrap();
    let status = daemon.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    assert!(start.elapsed() < END, "the end took {:?}: {}", start.elapsed(), daemon.log());
}

/// Waits until `what` holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn documented_command_line_serves_a_guest_and_leaves_nothing() {
    let place = Place::new();
    for round in ["cold", "warm"] {
        let mut daemon = place.start(&["--log-level", "info"]);
        assert_eq!(fs::metadata(place.socket()).unwrap().mode() & 0o7777, 0o600);
        let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
        assert_eq!(greeting(&mut guest), GREETING, "{round}");
        end(&mut daemon, Signal::TERM);
    }
    let left = names(&place.path("."));
    assert!(!left.iter().any(|name| name.starts_with("s.sock")), "{left:?}");
}

#[test]
fn both_signals_end_the_daemon_before_a_vmm_came_and_after() {
    let place = Place::new();
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = place.start(&[]);
        end(&mut daemon, signal);
        let mut daemon = place.start(&[]);
        drop(Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap());
        end(&mut daemon, signal);
    }
}

#[test]
fn stale_socket_of_a_killed_daemon_is_replaced() {
    let place = Place::new();
    place.start(&[]).kill();
    assert!(place.socket().exists());
    let mut daemon = place.start(&[]);
    let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
    assert_eq!(greeting(&mut guest), GREETING);
    end(&mut daemon, Signal::TERM);
}

#[test]
fn disconnect_is_followed_by_the_next_guest_or_by_the_end() {
    let place = Place::new();
    let mut daemon = place.start(&[]);
    for _ in 0..3 {
        let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
        assert_eq!(greeting(&mut guest), GREETING);
    }
    end(&mut daemon, Signal::TERM);
    let mut daemon = place.start(&["--exit-on-disconnect"]);
    drop(Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap());
    assert_eq!(daemon.wait(PATIENCE).unwrap().code(), Some(0), "{}", daemon.log());
    assert!(!place.socket().exists());
}

#[test]
fn inherited_listener_serves_one_connection() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let fd = listener.as_raw_fd().to_string();
    let arguments = ["--config", "config.json", "--bootstrap", "boot", "--fd", &fd];
    let mut daemon = DaemonProcess::start(place.command(arguments), &place.socket(), &place.path("log")).unwrap();
    drop(listener);
    let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
    assert_eq!(greeting(&mut guest), GREETING);
    drop(guest);
    assert_eq!(daemon.wait(PATIENCE).unwrap().code(), Some(0), "{}", daemon.log());
    assert!(place.socket().exists(), "the socket is not ours to remove");
}

/// A listener whose number is none of those that systemd passes: the scripts below put others there.
fn listen(place: &Place) -> UnixListener {
    let listener = UnixListener::bind(place.socket()).unwrap();
    UnixListener::from(rustix::io::fcntl_dupfd_cloexec(&listener, 100).unwrap())
}

/// Runs the daemon as systemd does: descriptors from 3 on, and variables that name this very process.
fn activate(place: &Place, listener: &UnixListener, script: &str) -> Command {
    rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::empty()).unwrap();
    let plain = place.command(["--config", "config.json", "--bootstrap", "boot"]);
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!("{script}; export LISTEN_PID=$$ LISTEN_FDS LISTEN_FDNAMES; exec \"$@\"")).arg("bash");
    command.arg(plain.get_program()).args(plain.get_args()).env("LISTENER", listener.as_raw_fd().to_string());
    if let Some(directory) = plain.get_current_dir() {
        command.current_dir(directory);
    }
    command
}

#[test]
fn socket_that_systemd_passes_serves_guest_after_guest() {
    let place = Place::new();
    let cases = [
        "exec 3<&$LISTENER; LISTEN_FDS=1",
        "exec 3<&$LISTENER; LISTEN_FDS=1 LISTEN_FDNAMES=nydusd.socket",
        "exec 3</dev/null 4<&$LISTENER 5</dev/null; LISTEN_FDS=3 LISTEN_FDNAMES=api:vhost-user-fs:other",
    ];
    for script in cases {
        let listener = listen(&place);
        let command = activate(&place, &listener, script);
        let mut daemon = DaemonProcess::start(command, &place.socket(), &place.path("log")).unwrap();
        drop(listener);
        for _ in 0..2 {
            let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
            assert_eq!(greeting(&mut guest), GREETING, "{script}");
        }
        end(&mut daemon, Signal::TERM);
        assert!(place.socket().exists(), "{script}: the socket is systemd's to remove");
        fs::remove_file(place.socket()).unwrap();
    }
}

#[test]
fn what_systemd_passes_and_cannot_be_served_is_one_line() {
    let place = Place::new();
    let listener = listen(&place);
    let cases = [
        ("exec 3</dev/null; LISTEN_FDS=1", "Error: descriptor 3 of LISTEN_FDS cannot be listened on: "),
        ("exec 3<&-; LISTEN_FDS=1", "Error: descriptor 3 of LISTEN_FDS cannot be listened on: Bad file descriptor"),
        (
            "exec 3<&$LISTENER 4<&$LISTENER; LISTEN_FDS=2",
            "Error: LISTEN_FDNAMES=\"\" of socket activation: of several sockets exactly one must be named vhost-user-fs",
        ),
        ("LISTEN_FDS=some", "Error: LISTEN_FDS=\"some\" of socket activation: not a number"),
        ("LISTEN_FDS=0", "error: give --sock PATH (or --fd N) to serve a VM"),
    ];
    for (script, expected) in cases {
        let output = activate(&place, &listener, script).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().last().unwrap_or_default();
        assert!(line.starts_with(expected), "{script}: {text}");
        assert_eq!(output.status.code(), Some(if expected.starts_with("error") { 2 } else { 1 }), "{script}");
    }
}

#[test]
fn counters_are_one_json_line_at_usr1_and_at_a_clean_end_when_debugging() {
    let place = Place::new();
    let mut daemon = place.start(&["--log-level", "debug"]);
    let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
    assert_eq!(greeting(&mut guest), GREETING);
    let counters = |log: &str| -> Vec<serde_json::Value> {
        let lines = log.lines().filter_map(|line| line.split_once("counters: "));
        lines.map(|(_, json)| serde_json::from_str(json).unwrap()).collect()
    };
    daemon.signal(Signal::USR1).unwrap();
    until("counters", || daemon.log().lines().any(|line| line.contains("counters: ") && line.ends_with('}')));
    let first = counters(&daemon.log());
    assert_eq!(first[0]["ops"]["26"], 1, "one INIT: {first:?}");
    assert!(first[0]["requests"].as_u64().unwrap() >= 3, "{first:?}");
    drop(guest);
    end(&mut daemon, Signal::TERM);
    assert_eq!(counters(&daemon.log()).len(), 2);
}

#[test]
fn log_lines_have_the_documented_form() {
    let place = Place::new();
    place.write_config(&place.config(", \"unknown_thing\": 1"));
    let mut daemon = place.start(&["--thread-pool-size=1", "--id", "vm1"]);
    end(&mut daemon, Signal::TERM);
    let log = daemon.log();
    let backend = log.lines().find(|line| line.contains("backend config")).unwrap();
    let (time, text) = backend.split_once("] ").unwrap();
    assert!(time.starts_with("[20") && time.ends_with(" +00:00") && time.len() == 34, "{backend}");
    let documented = "INFO backend config: CommonConfig { proxy: ProxyConfig { url: \"\", ping_url: \"\", fallback: \
                      true, check_interval: 5 }, timeout: 5, connect_timeout: 5, retry_limit: 0 }";
    assert_eq!(text, documented);
    for part in [
        "INFO Waiting for vhost-user socket connection...",
        "configuration: unknown key `unknown_thing` is ignored",
        "without effect here: --thread-pool-size",
        "vm1",
    ] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    assert!(!log.contains('\x1b'), "no colours where there is no terminal");
}

#[test]
fn version_has_five_lines_and_help_names_units_and_defaults() {
    let place = Place::new();
    for arguments in [&["--version"][..], &["-V"], &["virtiofs", "--version"]] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        let names: Vec<&str> = text.lines().filter_map(|line| line.split_once(": ")).map(|(name, _)| name).collect();
        assert_eq!(names, ["Version", "Git Commit", "Build Time", "Profile", "Rustc"], "{text}");
    }
    let help = String::from_utf8(place.run(["virtiofs", "--help"]).stdout).unwrap();
    for part in ["[default: 8]", "[default: 1000000]", "MiB", "at most 107 bytes", "0600"] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
}

#[test]
fn localfs_dir_needs_no_configuration() {
    let place = Place::new();
    let arguments = ["virtiofs", "--localfs-dir", "blobs", "--bootstrap", "boot", "--sock"];
    let mut command = place.command(arguments);
    command.arg(place.socket());
    let mut daemon = DaemonProcess::start(command, &place.socket(), &place.path("log")).unwrap();
    let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
    assert_eq!(greeting(&mut guest), GREETING);
    end(&mut daemon, Signal::TERM);
    assert!(names(&place.path("blobs")).len() > 1, "cache files lie beside the blobs");
}

#[test]
fn stdout_stays_open_until_the_end() {
    let place = Place::new();
    let mut command = place.command(place.arguments());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    until("the socket", || place.socket().exists());
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    // Kata takes the end of this stream for the end of the daemon: it must come, and not before.
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn cached_mode_serves_after_the_bootstrap_was_cut() {
    let place = Place::new();
    place.write_config(&place.config(", \"mode\": \"cached\""));
    let mut daemon = place.start(&[]);
    let boot = fs::OpenOptions::new().write(true).open(place.path("boot")).unwrap();
    boot.set_len(0).unwrap();
    let mut guest = Guest::boot(&place.socket(), &GuestOptions::LINUX).unwrap();
    assert_eq!(greeting(&mut guest), GREETING);
    end(&mut daemon, Signal::TERM);
}
