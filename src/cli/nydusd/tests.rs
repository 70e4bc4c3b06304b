//! Every documented command line, and what is refused.

use super::*;
use crate::limits;

fn line(text: &str) -> Result<Serve, Refusal> {
    parse(text.split_whitespace(), || Ok(None))
}

fn served(text: &str) -> Serve {
    line(text).unwrap_or_else(|refusal| panic!("{text}: {refusal:?}"))
}

#[test]
fn documented_line_serves_a_vm_with_the_defaults() {
    let mut expected = Serve {
        id: None,
        log: Log { level: LogLevel::Info, file: None, rotation_mib: 0 },
        open_files: OpenFiles::Raise(1_000_000),
        listen: Listen::Path("S".into()),
        after_disconnect: AfterDisconnect::ListenAgain,
        request_queues: 8,
        awake: limits::DEFAULT_AWAKE,
        tag: None,
        zero_message_open: ZeroMessageOpen::WhereSafe,
        bootstrap: "B".into(),
        source: ConfigSource::File("C".into()),
        ignored: Vec::new(),
    };
    for text in [
        "nydusd --config C --sock S --bootstrap B --log-level info",
        "nydusd virtiofs --config C --sock S --bootstrap B --log-level info",
        "nydusd virtiofs --sock=S -l info --hybrid-mode -B B -C C",
        "nydusd virtiofs --hybrid-mode --log-level INFO --sock S -C C -B B -m /",
    ] {
        assert_eq!(served(text), expected, "{text}");
    }
    expected.id = Some("vm1".into());
    assert_eq!(served("nydusd --id vm1 --sock S -C C -B B"), expected);
}

#[test]
fn own_options_are_taken() {
    let serve = served(
        "nydusd virtiofs --fd 3 --queues 63 --poll-us 0 --tag nydus --zero-message-open off --rlimit-nofile 0 -L x \
         --log-rotation-size 5 -D /dir -B B",
    );
    assert_eq!(serve.listen, Listen::Descriptor(3));
    assert_eq!(serve.after_disconnect, AfterDisconnect::End);
    assert_eq!((serve.request_queues, serve.tag.as_deref()), (limits::MAX_REQUEST_QUEUES, Some("nydus")));
    assert!(serve.awake.is_zero());
    assert_eq!(serve.zero_message_open, ZeroMessageOpen::Never);
    assert_eq!(serve.open_files, OpenFiles::LeaveAlone);
    assert_eq!(serve.source, ConfigSource::LocalfsDir("/dir".into()));
    assert_eq!(serve.log, Log { level: LogLevel::Info, file: Some("x".into()), rotation_mib: 5 });
}

#[test]
fn disconnect_rule_can_be_turned_round() {
    for (text, expected) in [
        ("nydusd --sock S -C C -B B --exit-on-disconnect", AfterDisconnect::End),
        ("nydusd --fd 3 -C C -B B --keep-listening", AfterDisconnect::ListenAgain),
        ("nydusd --fd 3 -C C -B B --exit-on-disconnect", AfterDisconnect::End),
    ] {
        assert_eq!(served(text).after_disconnect, expected, "{text}");
    }
}

#[test]
fn activated_socket_is_taken_where_no_option_names_one() {
    let activated = |text: &str| parse(text.split_whitespace(), || Ok(Some(5)));
    for text in ["nydusd -C C -B B", "nydusd virtiofs -C C -B B"] {
        let serve = activated(text).unwrap_or_else(|refusal| panic!("{text}: {refusal:?}"));
        assert_eq!((serve.listen, serve.after_disconnect), (Listen::Activated(5), AfterDisconnect::ListenAgain));
    }
    let asked = |text: &str| parse(text.split_whitespace(), || panic!("{text} names a socket or needs none"));
    assert_eq!(asked("nydusd --sock S -C C -B B").unwrap().listen, Listen::Path("S".into()));
    assert_eq!(asked("nydusd --fd 4 -C C -B B").unwrap().listen, Listen::Descriptor(4));
    assert!(asked("nydusd --mountpoint M -C C -B B").is_err());
    let wrong = || {
        let (variable, value, what) = ("LISTEN_FDS", "x".into(), "not a number");
        Err(SocketError::Activation { variable, value, what })
    };
    let Err(Refusal::Failed(message)) = parse(["nydusd", "-C", "C", "-B", "B"], wrong) else { panic!("taken") };
    assert_eq!(message, "LISTEN_FDS=\"x\" of socket activation: not a number");
}

#[test]
fn options_of_other_daemons_are_named_once_and_change_nothing() {
    let plain = served("nydusd --sock S -C C -B B");
    let mut serve = served(
        "nydusd --sock S -C C -B B --thread-pool-size=1 --announce-submounts -o a=b -o c,d --cache auto \
         --inode-file-handles=mandatory --backend-source http://x/y --syslog --xattr --sandbox none --seccomp none \
         --thread-num 4 --readonly --posix-acl=never",
    );
    let expected = [
        "--thread-pool-size",
        "--announce-submounts",
        "-o",
        "--cache",
        "--inode-file-handles",
        "--xattr",
        "--posix-acl",
        "--sandbox",
        "--seccomp",
        "--readonly",
        "--backend-source",
        "--syslog",
        "--fuse-threads",
    ];
    assert_eq!(std::mem::take(&mut serve.ignored), expected);
    assert_eq!(serve, plain);
}

#[test]
fn what_is_not_built_is_named_in_one_line() {
    for (text, named) in [
        ("nydusd --mountpoint M -C C -B B", "`--mountpoint`"),
        ("nydusd fuse -M M -C C -B B --thread-num 4 --failover-policy flush --writable", "`fuse`"),
        ("nydusd --apisock A --config C --mountpoint M", "`--apisock`"),
        ("nydusd virtiofs --log-level info --apisock A --sock S", "`--apisock`"),
        ("nydusd --sock S -s DIR", "`--shared-dir`"),
        ("nydusd --sock S -C C -B B --prefetch-files F", "`--prefetch-files`"),
        ("nydusd --sock S -C C -B B -m /sub", "`--virtual-mountpoint`"),
        ("nydusd --sock S -C C -B B --supervisor X --id 1", "`--supervisor`"),
        ("nydusd --sock S -C C -B B --upgrade", "`--upgrade`"),
        ("nydusd --sock S -C C -B B --dedup-db F", "`--dedup-db`"),
        ("nydusd --sock S -C C -B B --writable", "`--writable`"),
        ("nydusd --fd 3 -o source=/dir,cache=none", "`-o source=`"),
        ("nydusd --sock S -C C", "without `--bootstrap`"),
        ("nydusd --sock S", "without `--bootstrap`"),
        ("nydusd singleton --fscache D -A x", "`singleton`"),
        ("nydusd nbd /dev/nbd0 -B B", "`nbd`"),
        ("nydusd uffd -S s", "`uffd`"),
    ] {
        let Err(Refusal::Failed(message)) = line(text) else { panic!("{text} was not refused") };
        assert!(
            message.contains(named) && message.ends_with("is not built yet, see nydusd --help for what is"),
            "{text}: {message}"
        );
        assert!(!message.contains('\n'));
    }
}

#[test]
fn bootstrap_without_source_of_blobs_fails() {
    let Err(Refusal::Failed(message)) = line("nydusd --sock S -B B") else { panic!("not refused") };
    assert!(message.starts_with("both --config and --localfs-dir are missing"), "{message}");
}

#[test]
fn wrong_usage_exits_with_2() {
    for text in [
        "nydusd",
        "nydusd --config C",
        "nydusd virtiofs -C C -B B",
        "nydusd --sock S --mountpoint M",
        "nydusd --sock S --fd 3 -C C -B B",
        "nydusd --sock S -B B -s D",
        "nydusd --sock S -B B -C C -D D",
        "nydusd --sock S --prefetch-files F",
        "nydusd --sock S --exit-on-disconnect --keep-listening -B B -C C",
        "nydusd --log-level info virtiofs --sock S",
        "nydusd --sock S --queues 0",
        "nydusd --sock S --queues 64",
        "nydusd --fd 2 -C C -B B",
        "nydusd --sock S --tag 1234567890123456789012345678901234567",
        "nydusd --sock S --log-level loud",
        "nydusd --sock S --no-such-option",
        "nydusd virtiofs --sock S --mountpoint M",
        "nydusd no-such-command",
    ] {
        let Err(Refusal::Usage(error)) = line(text) else { panic!("{text} was not refused as usage") };
        assert_eq!(error.exit_code(), 2, "{text}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for text in ["nydusd --help", "nydusd -h", "nydusd -V", "nydusd virtiofs --version", "nydusd virtiofs --help"] {
        let Err(Refusal::Usage(error)) = line(text) else { panic!("{text} was not answered") };
        assert_eq!(error.exit_code(), 0, "{text}");
    }
}

#[test]
fn command_definition_is_consistent() {
    Cli::command().debug_assert();
}
