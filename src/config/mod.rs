//! nydusd's configuration: JSON and TOML, version 1 and 2, into one validated [`Config`].
//!
//! Nothing outside this room knows version 1. An unknown key is one warning with its path; a known key with a wrong
//! value is an error with path, line and what is allowed; credentials are never shown. Whether a setting can be served
//! is not decided here: what cannot be served yet parses all the same. Knows no device and starts nothing.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use serde::Deserialize;

mod backend;
mod strings;
mod syntax;
#[cfg(test)]
mod tests;
mod v1;
mod v2;
mod value;
mod wire;

pub use backend::Backend;
pub use backend::Bucket;
pub use backend::CommonConfig;
pub use backend::Mirror;
pub use backend::Proxy;
pub use backend::Registry;
pub use backend::Route;
pub use backend::Scheme;
pub use backend::Source;
pub use value::Endpoint;
pub use value::Secret;
pub use wire::Mode;

use crate::limits::MAX_CONFIG_BYTES;
use syntax::Text;
use value::Check;
use value::Table;
use value::UpTo;
use wire::BackendTable;
use wire::Base;
use wire::Kind;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than any configuration.
    #[error("configuration file {} is larger than {MAX_CONFIG_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The content of a file is wrong.
    #[error("configuration file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<ConfigError>,
    },
    /// A text is not what it should be: path of the field, what is allowed, line.
    #[error("{0}")]
    Content(String),
}

/// What one mount, or a whole daemon, is configured to serve. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Name of the group of caches and blobs.
    pub id: String,
    /// Where blobs come from, if the configuration says so.
    pub backend: Option<Backend>,
    /// Where blobs with the feature "external" come from: the first one that fits, else [`Config::backend`].
    pub external_backends: Vec<ExternalBackend>,
    /// What is kept of fetched blobs.
    pub cache: Cache,
    /// How the image is served.
    pub image: ImageOptions,
    /// What is fetched before it is asked for; `None`: nothing.
    pub prefetch: Option<Prefetch>,
    /// The writable layer.
    pub overlay: Option<Overlay>,
}

/// A backend of external blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalBackend {
    /// Which blobs it is for. The key `blob_id` names one; nothing: all. Other keys belong to descriptions of backends
    /// inside of images, which are not read, and fit no blob.
    pub patch: BTreeMap<String, String>,
    /// The backend.
    pub backend: Backend,
}

impl ExternalBackend {
    /// Whether the external blob `id` comes from here.
    pub fn fits(&self, id: &str) -> bool {
        self.patch.iter().all(|(key, value)| key == BLOB_ID && value == id)
    }

    fn unknown_key(&self) -> Option<&str> {
        self.patch.keys().map(String::as_str).find(|key| *key != BLOB_ID)
    }
}

/// The key of [`ExternalBackend::patch`] that names a blob.
const BLOB_ID: &str = "blob_id";

/// What is kept of fetched blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Where.
    pub store: CacheStore,
    /// Whether chunks are kept as fetched.
    pub compressed: bool,
    /// Whether chunks found in the cache are verified on their first use.
    pub validate: bool,
}

/// Where fetched chunks are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheStore {
    /// Nowhere: `dummycache`.
    None,
    /// In files: `blobcache`, `filecache`.
    Files {
        /// Their directory.
        work_dir: PathBuf,
        /// A plain presence list in memory instead of the chunk map file.
        disable_indexed_map: bool,
        /// Whether the files are to be encrypted.
        encryption: Option<CacheEncryption>,
    },
    /// In the kernel's cache: `fscache`.
    Fscache {
        /// Directory of the kernel's cache.
        work_dir: PathBuf,
    },
}

/// How cache files are encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEncryption {
    /// All chunks with this key.
    Key(CacheKey),
    /// Each chunk with its digest: equal chunks give equal bytes.
    Convergent,
}

/// A key of AES-128-XTS, whose halves differ. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct CacheKey([u8; 32]);

impl CacheKey {
    /// A key of 64 hex digits. `None`: it is not one, or its halves are equal.
    pub fn from_hex(digits: &Secret) -> Option<Self> {
        let key: [u8; 32] = hex::decode(digits.expose()).ok()?.try_into().ok()?;
        (key[..16] != key[16..]).then_some(Self(key))
    }

    /// Its bytes, for a cipher and for nothing else.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for CacheKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

/// How an image is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageOptions {
    /// How the metadata is held.
    pub mode: Mode,
    /// A small cold read is amplified to this many bytes.
    pub amplify_bytes: u32,
    /// Whether the digests of the inode tree (v5) are verified.
    pub validate: bool,
    /// Whether extended attributes are shown.
    pub xattr: bool,
    /// Whether reads are counted per file.
    pub iostats_files: bool,
    /// Whether access patterns are recorded.
    pub access_pattern: bool,
    /// Whether the latest read files are recorded.
    pub latest_read_files: bool,
}

/// What is fetched before it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefetch {
    /// Requests at a time.
    pub threads: u16,
    /// Bytes of one request.
    pub batch_bytes: u32,
    /// Bytes per second; 0: no limit.
    pub bandwidth_limit: u64,
    /// Whether everything is fetched, after what the image lists.
    pub everything: bool,
    /// Whether whole blobs are fetched by one request.
    pub stream: bool,
}

/// The writable layer of an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// What is written.
    pub upper_dir: PathBuf,
    /// Scratch space on the same file system.
    pub work_dir: PathBuf,
}

/// Lines for the log, each once, in the order they were found.
#[derive(Debug, Default)]
struct Warnings(Vec<String>);

impl Warnings {
    fn add(&mut self, warning: String) {
        if !self.0.contains(&warning) {
            self.0.push(warning);
        }
    }
}

/// What says which version and which backend a text is for.
#[derive(Deserialize)]
struct Probe {
    version: Option<UpTo<{ u32::MAX as u64 }>>,
    device: Option<Table<ProbeDevice>>,
}

#[derive(Deserialize)]
struct ProbeDevice {
    backend: Option<Table<ProbeBackend>>,
}

#[derive(Deserialize)]
struct ProbeBackend {
    #[serde(rename = "type")]
    kind: Option<Kind>,
}

impl Check for Probe {}

impl Check for ProbeDevice {}

impl Check for ProbeBackend {}

impl Config {
    /// Reads the file `path`; relative paths in it are taken from `directory`, which is absolute. The second value is
    /// what the log should warn of.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::TooLarge`], and [`ConfigError::File`] around [`ConfigError::Content`].
    pub fn load(path: &Path, directory: &Path) -> Result<(Self, Vec<String>), ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(read)?;
        file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        let in_file = |source| ConfigError::File { path: path.to_owned(), source: Box::new(source) };
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            in_file(ConfigError::Content(format!("not UTF-8 text at offset {:#x}", error.valid_up_to())))
        })?;
        Self::parse(text, directory).map_err(in_file)
    }

    /// Parses a configuration text; see [`Config::load`].
    ///
    /// # Errors
    /// [`ConfigError::Content`].
    pub fn parse(text: &str, directory: &Path) -> Result<(Self, Vec<String>), ConfigError> {
        let text = Text::new(text);
        let base = Base(directory);
        let mut warnings = Warnings(text.warnings.clone());
        let probe = text.read::<Table<Probe>>()?.content.0;
        let config = match (probe.version, probe.device) {
            (Some(UpTo(2)), _) => {
                let document = text.read::<Table<v2::Document>>()?;
                warn_unknown(&document.unknown, &mut warnings);
                document.content.0.into_config(base, &mut warnings)
            }
            (None | Some(UpTo(1)), Some(device)) => {
                let kind = device.0.backend.and_then(|backend| backend.0.kind);
                let kind = kind.ok_or_else(|| missing("device.backend.type", Kind::ALLOWED))?;
                match kind {
                    Kind::Localfs => read_v1::<wire::Localfs>(&text, base, &mut warnings),
                    Kind::Localdisk => read_v1::<wire::Localdisk>(&text, base, &mut warnings),
                    Kind::Oss => read_v1::<wire::Oss>(&text, base, &mut warnings),
                    Kind::S3 => read_v1::<wire::S3>(&text, base, &mut warnings),
                    Kind::Registry => read_v1::<wire::Registry>(&text, base, &mut warnings),
                    Kind::HttpProxy => read_v1::<wire::HttpProxy>(&text, base, &mut warnings),
                }?
            }
            (None, None) => return Err(missing("version` (2) or `device", "one of them")),
            (Some(UpTo(1)), None) => return Err(missing("device", "a table")),
            (Some(UpTo(version)), _) => {
                return Err(ConfigError::Content(format!("version: invalid value {version}, expected 2 (or 1)")));
            }
        };
        config.warn_incomplete(&mut warnings);
        Ok((config, warnings.0))
    }

    /// What `--localfs-dir` stands for: blobs and cache files in one directory, nothing validated beyond the rule.
    pub fn localfs_dir(directory: &Path) -> Self {
        let text = "{\"version\": 2, \"backend\": {\"type\": \"localfs\", \"localfs\": {\"dir\": \".\"}}, \
                    \"cache\": {\"type\": \"blobcache\", \"filecache\": {\"work_dir\": \".\"}}, \
                    \"rafs\": {\"mode\": \"direct\", \"enable_xattr\": true}}";
        Self::parse(text, directory).expect("a text of our own parses").0
    }

    /// Replaces the registry's `auth`, as `IMAGE_PULL_AUTH` does; other backends have none.
    pub fn set_pull_auth(&mut self, auth: Secret) {
        if let Some(Backend { source: Source::Registry(registry), .. }) = &mut self.backend {
            registry.auth = auth;
        }
    }

    fn warn_incomplete(&self, warnings: &mut Warnings) {
        if let Some(backend) = &self.backend
            && let Some(field) = backend.missing_field()
        {
            warnings.add(format!("backend `{}` lacks `{field}`: images with blobs cannot be served", backend.kind()));
        }
        for (place, external) in self.external_backends.iter().enumerate() {
            if let Some(key) = external.unknown_key() {
                warnings.add(format!("external_backends[{place}].patch has `{key}`, and so fits no blob"));
            }
            if let Some(field) = external.backend.missing_field() {
                let kind = external.backend.kind();
                warnings.add(format!("external_backends[{place}] (`{kind}`) lacks `{field}`: it cannot be used"));
            }
        }
    }
}

impl Cache {
    fn none() -> Self {
        Self { store: CacheStore::None, compressed: false, validate: false }
    }
}

impl CacheStore {
    fn files(table: wire::CacheFiles, base: Base<'_>) -> Self {
        Self::Files {
            work_dir: base.join(&table.work_dir),
            disable_indexed_map: table.disable_indexed_map,
            encryption: match (table.enable_encryption, table.enable_convergent_encryption) {
                (_, true) => Some(CacheEncryption::Convergent),
                // Checked where it was read.
                (true, false) => CacheKey::from_hex(&table.encryption_key).map(CacheEncryption::Key),
                (false, false) => None,
            },
        }
    }
}

fn read_v1<B: BackendTable>(text: &Text<'_>, base: Base<'_>, warnings: &mut Warnings) -> Result<Config, ConfigError> {
    let document = text.read::<Table<v1::Document<B>>>()?;
    warn_unknown(&document.unknown, warnings);
    Ok(document.content.0.into_config(base))
}

fn warn_unknown(paths: &BTreeSet<String>, warnings: &mut Warnings) {
    for path in paths.iter().filter(|path| *path != "version") {
        warnings.add(format!("unknown key `{path}` is ignored"));
    }
}

fn missing(field: &str, allowed: &str) -> ConfigError {
    ConfigError::Content(format!("`{field}` is missing, expected {allowed}"))
}
