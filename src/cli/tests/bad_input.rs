//! Every wrong start: exit code 1 and exactly one line on stderr that names the file, field or offset.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Output;

use rustix::fs::FileType;
use rustix::fs::Mode;

use crate::place::Place;

/// The only line on stderr of a start that failed.
fn line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("Error: ") && text.ends_with('\n'), "{text}");
    text
}

/// Starts a daemon with the documented arguments, which must fail; what it says must contain all of `expected`.
fn refused(place: &Place, expected: &[&str]) {
    let mut arguments = place.arguments();
    arguments.extend(["--log-level".to_owned(), "error".to_owned()]);
    let text = line(&place.run(arguments));
    for part in expected {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let left = crate::place::names(&place.path("."));
    assert!(!left.iter().any(|name| name.starts_with("s.sock")), "{left:?}");
}

#[test]
fn configuration_errors_name_the_file_field_and_line() {
    let place = Place::new();
    for (text, expected) in [
        (
            place.config(",\n\"amplify_io\": \"much\""),
            "amplify_io: invalid type: a string, expected an integer from 0 to 268435456",
        ),
        (
            place.config(",\n\"amplify_io\": 268435457"),
            "amplify_io: invalid value: integer `268435457`, expected an integer",
        ),
        (
            place.config(",\n\"mode\": \"lazy\""),
            "mode: invalid value: a string, expected one of \"direct\", \"cached\"",
        ),
        (place.config(",\n\"enable_xattr\": true"), "duplicate field `enable_xattr`"),
        (
            "{\"version\": 2, \"cache\": {\"type\": \"blobcache\", \"filecache\": {\"enable_encryption\": true}}}"
                .to_owned(),
            "cache.filecache: invalid `encryption_key`, expected 64 hex digits whose halves differ",
        ),
        ("{\"device\": ".to_owned(), "Unterminated object"),
        (String::new(), "is missing"),
        (format!("{{\"device\":{}", "[".repeat(100_000)), "device: invalid type: sequence, expected a table"),
        (format!("{{\"other\":{}", "[".repeat(100_000)), "Maximum nesting depth exceeded"),
    ] {
        place.write_config(&text);
        refused(&place, &["config.json: ", expected]);
    }
    fs::remove_file(place.path("config.json")).unwrap();
    refused(&place, &["config.json: No such file or directory"]);
    fs::create_dir(place.path("config.json")).unwrap();
    refused(&place, &["config.json: Is a directory"]);
}

#[test]
fn what_is_configured_and_not_built_is_named() {
    let place = Place::new();
    let v2 = |more: &str| {
        format!(
            "{{\"version\": 2, \"backend\": {{\"type\": \"localfs\", \"localfs\": {{\"dir\": \"blobs\"}}}}, {more}}}"
        )
    };
    let registry =
        "{\"device\": {\"backend\": {\"type\": \"registry\", \"config\": {\"host\": \"h\", \"repo\": \"r\"}}}}";
    for (text, expected) in [
        (registry.to_owned(), "backend `registry` is configured, and not built yet"),
        (v2("\"overlay\": {\"upper_dir\": \"u\", \"work_dir\": \"w\"}"), "`overlay` is configured, and not built yet"),
        (v2("\"cache\": {\"type\": \"fscache\"}"), "cache `fscache` is configured, and not built yet"),
        (v2("\"external_backends\": [{\"type\": \"s3\"}]"), "backend `s3` is configured, and not built yet"),
    ] {
        place.write_config(&text);
        refused(&place, &[expected]);
    }
}

#[test]
fn bootstrap_errors_name_the_file() {
    let place = Place::new();
    let boot = place.path("boot");
    let good = fs::read(&boot).unwrap();
    let mut wrong_magic = good.clone();
    wrong_magic[1024] ^= 1;
    let truncated = good[..1500].to_vec();
    let newer = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    // The blob table of such an image begins at 4096.
    let (new_flag, new_feature, new_compressor) = (newer(1152 + 5, 4), newer(4096 + 85, 0x10), newer(4096 + 76, 9));
    for (bytes, expected) in [
        (wrong_magic, "wrong magic number"),
        (truncated, "damaged or cut short, fetch or build it again: "),
        (new_flag, "superblock flags 0x40000000000 of the image can be read by tools newer than nydus v2.4.4 only"),
        (new_feature, "cannot be served, make the image without this feature: blob features 0x1000 of blob "),
        (new_compressor, "can be read by tools newer than nydus v2.4.4 only"),
        (Vec::new(), "wrong magic number"),
        (vec![b'x'; 100_000], "wrong magic number"),
    ] {
        for mode in ["direct", "cached"] {
            place.write_config(&place.config(&format!(", \"mode\": \"{mode}\"")));
            fs::write(&boot, &bytes).unwrap();
            refused(&place, &["/boot: ", expected]);
        }
    }
    fs::remove_file(&boot).unwrap();
    refused(&place, &["/boot: cannot be read: No such file or directory"]);
    symlink("boot", &boot).unwrap();
    refused(&place, &["/boot: cannot be read: ", "symbolic links"]);
    fs::remove_file(&boot).unwrap();
    fs::create_dir(&boot).unwrap();
    refused(&place, &["/boot: not a regular file"]);
    fs::remove_dir(&boot).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &boot, FileType::Fifo, Mode::RUSR, 0).unwrap();
    refused(&place, &["/boot: not a regular file"]);
}

#[test]
fn blob_errors_name_the_file_and_the_sizes() {
    let place = Place::new();
    let blob = place.blob();
    let name = blob.file_name().unwrap().to_str().unwrap().to_owned();
    let size = fs::metadata(&blob).unwrap().len();
    OpenOptions::new().write(true).open(&blob).unwrap().set_len(size - 1).unwrap();
    refused(&place, &[&name, &format!("has {} bytes", size - 1)]);
    fs::remove_file(&blob).unwrap();
    refused(&place, &[&name, "is not in", "/blobs"]);
    rustix::fs::mknodat(rustix::fs::CWD, &blob, FileType::Fifo, Mode::RUSR, 0).unwrap();
    refused(&place, &[&name, "is not a regular file"]);
    place.write_config("{\"device\": {\"backend\": {\"type\": \"localfs\"}}}");
    let arguments = place.arguments().into_iter().chain(["--log-level".to_owned(), "error".to_owned()]);
    let text = line(&place.run(arguments));
    assert!(text.contains("the configuration lacks `dir` or `blob_file`"), "{text}");
}

#[test]
fn cache_directory_that_cannot_be_made_is_named() {
    let place = Place::new();
    fs::write(place.path("cache"), "a file").unwrap();
    refused(&place, &["/cache"]);
}

#[test]
fn socket_errors_name_the_path() {
    let place = Place::new();
    let run = |socket: &str| {
        let arguments = ["--config", "config.json", "--bootstrap", "boot", "-l", "error", "--sock", socket];
        line(&place.run(arguments))
    };
    let long = format!("/tmp/{}", "x".repeat(103));
    assert!(run(&long).contains("is too long: 108 bytes, at most 107"), "{}", run(&long));
    let nowhere = run("missing/s.sock");
    assert!(nowhere.contains("directory missing of the socket does not exist, make it"), "{nowhere}");
    assert!(run("config.json").contains("exists and is not a socket"), "{}", run("config.json"));
    let _foreign = UnixListener::bind(place.path("foreign.sock")).unwrap();
    assert!(run("foreign.sock").contains("in use by a live daemon"), "{}", run("foreign.sock"));
    let _daemon = place.start(&[]);
    assert!(run("s.sock").contains("in use by a live daemon"), "{}", run("s.sock"));
}

#[test]
fn descriptor_that_is_no_listening_socket_is_refused() {
    let place = Place::new();
    let output = place.run(["--config", "config.json", "--bootstrap", "boot", "-l", "error", "--fd", "77"]);
    let text = line(&output);
    assert!(text.contains("descriptor 77 of --fd cannot be listened on: Bad file descriptor"), "{text}");
}

#[test]
fn log_file_that_cannot_be_opened_is_named() {
    let place = Place::new();
    let mut arguments = place.arguments();
    arguments.extend(["-L".to_owned(), "missing/nydusd".to_owned()]);
    let text = line(&place.run(arguments));
    assert!(text.contains("missing/nydusd.log"), "{text}");
}

#[test]
fn error_is_also_in_the_log_file() {
    let place = Place::new();
    fs::remove_file(place.path("boot")).unwrap();
    let mut arguments = place.arguments();
    arguments.extend(["-L".to_owned(), "nydusd".to_owned()]);
    let text = line(&place.run(arguments));
    let log = fs::read_to_string(place.path("nydusd.log")).unwrap();
    assert!(log.contains(text.trim_start_matches("Error: ").trim_end()), "{log}");
    assert!(log.contains(" INFO backend config: CommonConfig { proxy: ProxyConfig { url: \"\""), "{log}");
}

#[test]
fn usage_errors_are_one_line_and_exit_with_2() {
    let place = Place::new();
    for arguments in [&["--no-such-option"][..], &[], &["virtiofs"], &["--sock", "s", "--queues", "0"]] {
        let output = place.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("error: ") && text.ends_with("; see nydusd --help\n"), "{text}");
    }
}
