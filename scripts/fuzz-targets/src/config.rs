//! Configurations: any text becomes a [`Config`] or an error that says where.

use std::path::Path;

use nydus_vm::config::Config;

use crate::seeds::Seed;

/// Reads `data` as a configuration file.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text, Path::new("/etc/nydus")) {
        Ok((config, _)) => {
            // Secrets are not shown, whatever they are.
            let _ = format!("{config:?}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// One of each version and syntax, with all sections.
pub fn seeds() -> Vec<Seed> {
    let v1 = r#"{"device":{"backend":{"type":"registry","config":{"scheme":"https","host":"h:5000","repo":"a/b","auth":"dTpw",
"proxy":{"url":"http://p","ping_url":"http://p/ping","fallback":true,"check_interval":5,"use_http":false},
"mirrors":[{"host":"http://m","headers":{"a":"b"},"health_check_interval":5,"failure_limit":5}],
"timeout":5,"connect_timeout":5,"retry_limit":2}},
"cache":{"type":"blobcache","compressed":true,"config":{"work_dir":"/c","disable_indexed_map":true}}},
"mode":"direct","digest_validate":true,"iostats_files":true,"enable_xattr":true,"access_pattern":true,
"latest_read_files":true,"amplify_io":1048576,
"fs_prefetch":{"enable":true,"threads_count":4,"merging_size":131072,"bandwidth_rate":1048576,"prefetch_all":true}} // end"#;
    let v2 = r#"{"version":2,"id":"i","backend":{"type":"localfs","localfs":{"dir":"blobs","blob_file":"f","alt_dirs":["a","b"]}},
"cache":{"type":"filecache","compressed":false,"validate":true,"filecache":{"work_dir":"."},
"prefetch":{"enable":true,"threads":8,"batch_size":1000000,"bandwidth_limit":10000000}},
"rafs":{"mode":"direct","batch_size":1000000,"validate":true,"enable_xattr":true,
"prefetch":{"enable":true,"threads":4,"batch_size":1000000,"bandwidth_limit":10000000,"prefetch_all":true}},
"overlay":{"upper_dir":"u","work_dir":"w"},"external_backends":[{"type":"x","patch":{"a":"b"},"config":{"k":"v"}}]}"#;
    let toml = r#"version = 2
id = "my_id"
[backend]
type = "oss"
[backend.oss]
endpoint = "oss-cn-1.example"
bucket_name = "b"
object_prefix = "p/"
access_key_id = "k"
access_key_secret = "s"
retry_limit = 3
[backend.oss.proxy]
url = "localhost:6789"
fallback = true
[cache]
type = "blobcache"
[cache.filecache]
work_dir = "/tmp"
enable_encryption = true
enable_convergent_encryption = true
encryption_key = "f"
[rafs]
mode = "cached"
"#;
    [("v1-json", v1), ("v2-json", v2), ("v2-toml", toml)].map(|(name, text)| (name.to_owned(), text.into())).to_vec()
}
