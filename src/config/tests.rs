//! The published samples, the rules for wrong input, and texts of arbitrary bytes.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BASE: &str = "/start";

fn parse(text: &str) -> Result<(Config, Vec<String>), String> {
    Config::parse(text, Path::new(BASE)).map_err(|error| error.to_string())
}

/// A sample as published: lines of only `...` stand for what was left out.
fn sample(text: &str) -> (Config, Vec<String>) {
    let kept: Vec<&str> = text.lines().filter(|line| line.trim() != "...").collect();
    parse(&kept.join("\n")).unwrap()
}

fn localfs(dir: &str) -> Source {
    Source::Localfs { blob_file: None, dir: Some(PathBuf::from(dir)), alt_dirs: Vec::new() }
}

fn files(dir: &str) -> CacheStore {
    CacheStore::Files { work_dir: PathBuf::from(dir), disable_indexed_map: false, encryption: None }
}

#[test]
fn localfs_sample_parses_without_warnings() {
    let (config, warnings) = sample(include_str!("samples/localfs.json"));
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(config.backend.unwrap().source, localfs("/var/lib/nydus/blobs"));
    assert_eq!(config.cache, Cache { store: files("/var/lib/nydus/cache"), compressed: false, validate: false });
    assert_eq!(config.image.mode, Mode::Direct);
    assert!(config.image.xattr && !config.image.validate && config.prefetch.is_none());
    assert_eq!(config.image.amplify_bytes, 1 << 20);
}

#[test]
fn full_sample_parses_and_warns_of_the_missing_directory() {
    let (config, warnings) = sample(include_str!("samples/full.json"));
    assert_eq!(warnings, ["backend `localfs` lacks `dir` or `blob_file`: images with blobs cannot be served"]);
    assert_eq!(config.backend.unwrap().missing_field(), Some("dir` or `blob_file"));
    assert!(config.cache.compressed && config.image.iostats_files && !config.image.xattr);
}

#[test]
fn readahead_sample_warns_once_per_unknown_key() {
    let (_, warnings) = sample(include_str!("samples/localfs-readahead.json"));
    let expected = ["readahead", "readahead_sec"];
    assert_eq!(warnings, expected.map(|key| format!("unknown key `device.backend.config.{key}` is ignored")));
}

#[test]
fn object_store_and_disk_samples_parse() {
    for (text, kind, missing) in [
        (include_str!("samples/localdisk.json"), "localdisk", None),
        (include_str!("samples/oss.json"), "oss", Some("bucket_name")),
        (include_str!("samples/s3.json"), "s3", Some("bucket_name")),
        (include_str!("samples/http-proxy.json"), "http-proxy", None),
        (include_str!("samples/http-proxy-unix.json"), "http-proxy", None),
    ] {
        let (config, _) = sample(text);
        let backend = config.backend.unwrap();
        assert_eq!((backend.kind(), backend.missing_field()), (kind, missing));
        assert_eq!(config.cache.store, CacheStore::None, "no cache section is dummycache");
        if let Source::S3 { region, .. } = backend.source {
            assert_eq!(region, "us-east-1");
        }
    }
}

#[test]
fn registry_sample_with_missing_comma_names_the_line() {
    let (config, warnings) = sample(include_str!("samples/registry.json"));
    assert_eq!(warnings, ["a comma is missing at the end of line 18; read as if it were there"]);
    let Source::Registry(registry) = config.backend.unwrap().source else { panic!("not a registry") };
    assert_eq!(registry.scheme, Scheme::Unstated);
    assert_eq!(registry.host.expose(), "my-registry:5000");
    assert_eq!(registry.registry_token.expose(), "<bearer_token>");
    assert_eq!(registry.blob_redirected_host.expose(), "<blob_redirected_host>");
}

#[test]
fn proxy_sample_logs_the_documented_line() {
    let (config, warnings) = sample(include_str!("samples/proxy.json"));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let line = config.backend.unwrap().common_config().to_string();
    let documented = "CommonConfig { proxy: ProxyConfig { url: \"http://p2p-proxy:65001\", ping_url: \
                      \"http://p2p-proxy:40901/server/ping\", fallback: true, check_interval: 5 }, timeout: 5, \
                      connect_timeout: 5, retry_limit: 0 }";
    assert_eq!(line, documented);
}

#[test]
fn mirrors_sample_keeps_order_and_headers() {
    let (config, _) = sample(include_str!("samples/mirrors.json"));
    let Route::Mirrors(mirrors) = config.backend.unwrap().route else { panic!("no mirrors") };
    assert_eq!(mirrors.len(), 2);
    assert_eq!(mirrors[0].host.expose(), "http://dragonfly1.io:65001");
    assert_eq!(mirrors[1].headers["X-Dragonfly-Registry"].expose(), "https://index.docker.io");
    assert_eq!(mirrors[1].health_check_pause_elapsed, Duration::from_secs(300));
}

#[test]
fn overlay_sample_takes_the_string_as_directory() {
    let (config, warnings) = sample(include_str!("samples/overlay.json"));
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(config.backend.unwrap().source, localfs("/var/lib/nydus/blobs"));
    assert_eq!(config.overlay.unwrap().upper_dir, PathBuf::from("/path/to/upperdir"));
}

#[test]
fn api_mount_sample_resolves_relative_directories_and_validates() {
    let (config, _) = sample(include_str!("samples/api-mount.json"));
    assert_eq!(config.backend.unwrap().source, localfs("/start/blobs"));
    assert_eq!(config.cache, Cache { store: files("/start/cache"), compressed: false, validate: true });
    assert!(config.image.validate);
}

#[test]
fn toml_gives_the_same_config_as_json() {
    let (config, warnings) = parse(include_str!("samples/v2.toml")).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(config.image.mode, Mode::Cached);
    assert_eq!(config.prefetch.as_ref().unwrap().threads, 4);
    assert_eq!(config.cache.store, files("/start/cache"));
    let backend = config.backend.as_ref().unwrap();
    assert_eq!((backend.retry_limit, backend.timeout), (2, Duration::from_secs(7)));
    let json = r#"{"version": 2, "id": "group", "backend": {"type": "registry", "s3": null, "registry":
        {"scheme": "https", "host": "registry.example:5000", "repo": "test/repo", "auth": "bWU6d29yZA==",
         "timeout": 7, "retry_limit": 2}},
        "cache": {"type": "filecache", "validate": true, "filecache": {"work_dir": "cache"}, "prefetch": null},
        "rafs": {"mode": "cached", "batch_size": 131072, "enable_xattr": true,
                 "prefetch": {"enable": true, "threads": 4}}}"#;
    assert_eq!(parse(json).unwrap(), (config, warnings));
}

#[test]
fn encryption_of_the_cache_needs_a_key_unless_it_is_convergent() {
    let encryption = |rest: &str| {
        let text = format!("version = 2\n[cache]\ntype = \"blobcache\"\n[cache.filecache]\n{rest}\n");
        let (config, _) = parse(&text)?;
        let CacheStore::Files { encryption, .. } = config.cache.store else { panic!("{config:?}") };
        Ok::<_, String>(encryption)
    };
    let (key, equal) = (format!("{}{}", "1a".repeat(16), "2b".repeat(16)), "1a".repeat(32));
    let with = |key: &str| format!("enable_encryption = true\nencryption_key = \"{key}\"");
    let Ok(Some(CacheEncryption::Key(parsed))) = encryption(&with(&key)) else { panic!("not a key") };
    assert_eq!(parsed.expose()[15..17], [0x1a, 0x2b]);
    assert_eq!(format!("{parsed:?}"), "(hidden)");
    for wrong in ["", "zz", &equal, &key[..62], &format!("{key}00")] {
        let error = encryption(&with(wrong)).unwrap_err();
        assert!(error.contains("encryption_key") && (wrong.is_empty() || !error.contains(wrong)), "{error}");
    }
    assert_eq!(encryption("enable_convergent_encryption = true"), Ok(Some(CacheEncryption::Convergent)));
    assert_eq!(encryption(&format!("encryption_key = \"{key}\"")), Ok(None));
}

#[test]
fn version_1_is_also_read_from_toml() {
    let text = "mode = \"direct\"\n[device.backend]\ntype = \"localfs\"\n[device.backend.config]\ndir = \"b\"\n";
    assert_eq!(parse(text).unwrap().0.backend.unwrap().source, localfs("/start/b"));
}

fn v1(backend: &str) -> String {
    format!("{{\n\"device\": {{\n\"backend\": {{\n\"type\": \"registry\",\n\"config\": {{\n{backend}\n}} }} }} }}")
}

#[test]
fn wrong_values_are_errors_with_path_line_and_what_is_allowed() {
    for (text, expected) in [
        (
            v1("\"timeout\": \"five\""),
            "device.backend.config.timeout: invalid type: a string, expected an integer from 0 to 4294967295 on line 6",
        ),
        (
            v1("\"retry_limit\": 256"),
            "device.backend.config.retry_limit: invalid value: integer `256`, expected an integer from 0 to 255 on line 6",
        ),
        (
            v1("\"proxy\": \"http://me:word@proxy\""),
            "device.backend.config.proxy: invalid type: a string, expected a table on line 6",
        ),
        (v1("\"auth\": 12345"), "device.backend.config.auth: invalid type: a number, expected a string on line 6"),
        (
            v1("\"scheme\": \"ftp\""),
            "device.backend.config.scheme: invalid value: a string, expected one of \"http\", \"https\", \"\" on line 6",
        ),
        (
            v1("\"mirrors\": [{\"host\": \"http://a\"}], \"proxy\": {\"url\": \"http://b\"}"),
            "device.backend.config: `mirrors` and `proxy` cannot be used together, give one of them on line 5",
        ),
        (
            v1("\"mirrors\": [{\"host\": \"http://a\"}, {\"ping_url\": \"x\"}]"),
            "device.backend.config.mirrors[1]: missing field `host` on line 6",
        ),
        (
            "{\"version\": 2,\n \"rafs\": {\"batch_size\": 268435457}}".to_owned(),
            "rafs.batch_size: invalid value: integer `268435457`, expected an integer from 0 to 268435456 on line 2",
        ),
        (
            "{\"version\": 2, \"rafs\": {\n\"prefetch\": {\"enable\": true, \"threads\": 0}}}".to_owned(),
            "rafs.prefetch: invalid `threads`: 0, expected an integer from 1 to 1024 when `enable` is true on line 2",
        ),
        (
            "version = 2\n[cache]\ntype = \"blobcache\"\n[cache.filecache]\nenable_encryption = true\n".to_owned(),
            "cache.filecache: invalid `encryption_key`, expected 64 hex digits whose halves differ",
        ),
        (
            "version = 2\n[rafs]\nmode = 5\n".to_owned(),
            "rafs.mode: invalid type: integer `5`, expected one of \"direct\", \"cached\" on line 3",
        ),
        (
            "version = 2\n[backend]\ntype = \"ftp\"\n".to_owned(),
            "backend.type: invalid value: a string, expected one of \"localfs\", \"localdisk\"",
        ),
        ("{\"version\": 2, \"cache\": [\"blobcache\"]}".to_owned(), "cache: invalid type: sequence, expected a table"),
        ("{\"version\": 3}".to_owned(), "version: invalid value 3, expected 2 (or 1)"),
        ("{}".to_owned(), "`version` (2) or `device` is missing, expected one of them"),
        ("{\"device\": {}}".to_owned(), "`device.backend.type` is missing, expected one of localfs, localdisk, oss"),
        ("{\"version\": 2, \"id\": 'x'}".to_owned(), "on line 1"),
        ("{\"version\": 2 \"id\": \"x\"}".to_owned(), "Expected comma on line 1"),
        ("{\"version\": 2, \"id\": \"a\", \"id\": \"b\"}".to_owned(), "duplicate field `id`"),
        ("version = ".to_owned(), "on line 1"),
        (String::new(), "`version` (2) or `device` is missing"),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.contains(expected), "for {text}\n   got {error}\nexpected {expected}");
        assert!(!error.contains('\n') && !error.contains("word"), "{error}");
    }
}

#[test]
fn unknown_keys_are_warned_of_with_their_path() {
    let text = "{\"version\": 2, \"strange\": {\"a\": 1}, \"rafs\": {\"prefetch\": {\"x\": 1}, \"odd\": []}}";
    let (_, warnings) = parse(text).unwrap();
    let expected = ["rafs.odd", "rafs.prefetch.x", "strange"];
    assert_eq!(warnings, expected.map(|key| format!("unknown key `{key}` is ignored")));
}

#[test]
fn credentials_are_never_shown() {
    let text = v1("\"auth\": \"word1\", \"registry_token\": \"word2\", \"proxy\": {\"url\": \"http://me:word3@p/\"}");
    let (mut config, warnings) = parse(&text).unwrap();
    let shown = format!("{config:?} {warnings:?} {}", config.backend.as_ref().unwrap().common_config());
    assert!(!shown.contains("word"), "{shown}");
    config.set_pull_auth(Secret::new("from the environment".to_owned()));
    let Some(Backend { source: Source::Registry(registry), .. }) = config.backend else { panic!("not a registry") };
    assert_eq!(registry.auth.expose(), "from the environment");
}

#[test]
fn nested_brackets_are_an_error() {
    for open in ["{\"device\":", "{\"version\": 2, \"x\": [", "["] {
        let bomb = format!("{open}{}", "[".repeat(200_000));
        assert!(parse(&bomb).is_err());
    }
    let tables = format!("x = {}", "{a = ".repeat(100_000));
    assert!(parse(&tables).is_err());
}

#[test]
fn load_names_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.json");
    let shown = |path: &Path| {
        let error = Config::load(path, directory.path()).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    assert!(shown(&path).contains("c.json: No such file"), "{}", shown(&path));
    std::fs::write(&path, b"{\"id\": \"\xff\"}").unwrap();
    assert!(shown(&path).ends_with("c.json: not UTF-8 text at offset 0x8"), "{}", shown(&path));
    std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    assert!(shown(&path).contains("larger than 1048576 bytes"), "{}", shown(&path));
}

#[test]
fn localfs_dir_uses_one_directory_for_blobs_and_cache() {
    let config = Config::localfs_dir(Path::new("/images"));
    assert_eq!(config.backend.unwrap().source, localfs("/images"));
    assert_eq!(config.cache.store, files("/images"));
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*") {
        let _ = parse(&text);
    }

    #[test]
    fn arbitrary_bytes_inside_a_sample_never_panic(at in 0usize..900, bytes in proptest::collection::vec(any::<u8>(), 0..8)) {
        for sample in [include_str!("samples/full.json"), include_str!("samples/v2.toml")] {
            let mut mutated = sample.as_bytes().to_vec();
            let at = at.min(mutated.len());
            mutated.splice(at..(at + bytes.len()).min(sample.len()), bytes.iter().copied());
            let _ = parse(&String::from_utf8_lossy(&mutated));
        }
    }
}

#[test]
fn external_backends_are_read_from_strings() {
    let text = r#"{"version": 2, "external_backends": [
        {"type": "localfs", "config": {"dir": "models", "timeout": "30", "skip_verify": "true"}, "patch": {"blob_id": "abc"}},
        {"type": "registry", "config": {"host": "h", "repo": "r", "auth": "c2VjcmV0"}},
        {"type": "localfs", "patch": {"other": "x"}}
    ]}"#;
    let (config, warnings) = Config::parse(text, Path::new("/base")).unwrap();
    let [one, two, three] = &config.external_backends[..] else { panic!("{config:?}") };
    let dir = Some(PathBuf::from("/base/models"));
    assert_eq!(one.backend.source, Source::Localfs { blob_file: None, dir, alt_dirs: Vec::new() });
    assert_eq!((one.backend.timeout.as_secs(), one.backend.skip_verify), (30, true));
    assert_eq!((one.fits("abc"), one.fits("abd"), two.fits("abc"), three.fits("abc")), (true, false, true, false));
    assert_eq!(two.backend.kind(), "registry");
    assert!(warnings.iter().any(|warning| warning.contains("external_backends[2].patch has `other`")), "{warnings:?}");
    assert!(warnings.iter().any(|warning| warning.contains("external_backends[2] (`localfs`) lacks")), "{warnings:?}");
    assert!(!format!("{config:?}").contains("c2VjcmV0"));

    let wrong =
        r#"{"version": 2, "external_backends": [{"type": "localfs", "config": {"dir": "d", "timeout": "soon"}}]}"#;
    let error = Config::parse(wrong, Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("external_backends[0]") && error.contains("an integer from 0"), "{error}");
}
