//! Tables that v1 and v2 share, as they are written; [`super::v1`] and [`super::v2`] say where they stand.
//!
//! Every field has its default beside it. Nothing here leaves `config`.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::Deserializer;
use serde::de;
use serde::de::Visitor;

use super::CacheKey;
use super::backend;
use super::backend::Backend;
use super::backend::Route;
use super::backend::Scheme;
use super::backend::Source;
use super::value::Check;
use super::value::Endpoint;
use super::value::Secret;
use super::value::Table;
use super::value::UpTo;
use super::value::choice;
use crate::limits;

pub(super) type Seconds = UpTo<{ u32::MAX as u64 }>;
pub(super) type AmplifyBytes = UpTo<{ limits::MAX_AMPLIFY_BYTES }>;

fn yes() -> bool {
    true
}

fn five() -> Seconds {
    UpTo(5)
}

/// The directory that relative paths are relative to.
#[derive(Clone, Copy)]
pub(super) struct Base<'a>(pub(super) &'a Path);

impl Base<'_> {
    /// `path` seen from the directory, without `.` in it.
    pub(super) fn join(self, path: &str) -> PathBuf {
        self.0.join(path).components().collect()
    }

    /// `None` for the empty path, which the samples use for "not given".
    pub(super) fn resolve(self, path: &str) -> Option<PathBuf> {
        if path.is_empty() { None } else { Some(self.join(path)) }
    }

    fn resolve_all(self, paths: &[String]) -> Vec<PathBuf> {
        paths.iter().filter_map(|path| self.resolve(path)).collect()
    }
}

/// The kinds of backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Localfs,
    Localdisk,
    Oss,
    S3,
    Registry,
    HttpProxy,
}

choice!(Kind {
    "localfs" => Localfs,
    "localdisk" => Localdisk,
    "oss" => Oss,
    "s3" => S3,
    "registry" => Registry,
    "http-proxy" => HttpProxy,
});

impl Kind {
    pub(super) const ALLOWED: &str = "one of localfs, localdisk, oss, s3, registry, http-proxy";

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Localfs => "localfs",
            Self::Localdisk => "localdisk",
            Self::Oss => "oss",
            Self::S3 => "s3",
            Self::Registry => "registry",
            Self::HttpProxy => "http-proxy",
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Proxy {
    #[serde(default)]
    url: Endpoint,
    #[serde(default)]
    ping_url: Endpoint,
    #[serde(default = "yes")]
    fallback: bool,
    #[serde(default = "five")]
    check_interval: Seconds,
    #[serde(default)]
    use_http: bool,
    #[serde(default = "Proxy::default_pause")]
    check_pause_elapsed: Seconds,
    #[serde(default)]
    dragonfly_scheduler_endpoint: Endpoint,
}

impl Proxy {
    fn default_pause() -> Seconds {
        UpTo(300)
    }

    fn is_used(&self) -> bool {
        !self.url.is_empty() || !self.dragonfly_scheduler_endpoint.is_empty()
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Mirror {
    host: Endpoint,
    #[serde(default)]
    ping_url: Endpoint,
    #[serde(default)]
    headers: BTreeMap<String, Secret>,
    #[serde(default = "five")]
    health_check_interval: Seconds,
    #[serde(default = "Mirror::default_failures")]
    failure_limit: UpTo<255>,
    #[serde(default = "Proxy::default_pause")]
    health_check_pause_elapsed: Seconds,
}

impl Mirror {
    fn default_failures() -> UpTo<255> {
        UpTo(5)
    }
}

impl Check for Proxy {}

impl Check for Mirror {}

/// A backend's table can say how to read itself.
pub(super) trait BackendTable: Check + de::DeserializeOwned {
    fn backend(self, base: Base<'_>) -> Backend;
}

/// Writes the struct of a backend: its own fields and those that every backend knows.
macro_rules! backend_table {
    ($name:ident { $($field:ident: $type:ty),* $(,)? } $source:expr) => {
        #[derive(Debug, Deserialize)]
        pub(super) struct $name {
            $(#[serde(default)] $field: $type,)*
            #[serde(default = "five")]
            timeout: Seconds,
            #[serde(default = "five")]
            connect_timeout: Seconds,
            #[serde(default = "no_retry")]
            retry_limit: UpTo<255>,
            #[serde(default = "default_deadline")]
            demand_deadline: Seconds,
            #[serde(default)]
            skip_verify: bool,
            #[serde(default)]
            ca_cert_files: Vec<String>,
            #[serde(default)]
            proxy: Option<Table<Proxy>>,
            #[serde(default)]
            mirrors: Option<Vec<Table<Mirror>>>,
        }

        impl Check for $name {
            fn check(&self) -> Result<(), String> {
                let both = self.proxy.as_ref().is_some_and(|proxy| proxy.0.is_used())
                    && self.mirrors.as_ref().is_some_and(|mirrors| !mirrors.is_empty());
                if both {
                    return Err("`mirrors` and `proxy` cannot be used together, give one of them".to_owned());
                }
                Ok(())
            }
        }

        impl BackendTable for $name {
            fn backend(self, base: Base<'_>) -> Backend {
                let source = $source;
                Backend {
                    source: source(&self, base),
                    timeout: Duration::from_secs(self.timeout.0),
                    connect_timeout: Duration::from_secs(self.connect_timeout.0),
                    retry_limit: self.retry_limit.narrow(),
                    demand_deadline: Duration::from_secs(self.demand_deadline.0),
                    skip_verify: self.skip_verify,
                    ca_cert_files: base.resolve_all(&self.ca_cert_files),
                    route: route(self.proxy, self.mirrors),
                }
            }
        }
    };
}

fn no_retry() -> UpTo<255> {
    UpTo(0)
}

fn default_deadline() -> Seconds {
    UpTo(limits::DEMAND_DEADLINE.as_secs())
}

fn route(proxy: Option<Table<Proxy>>, mirrors: Option<Vec<Table<Mirror>>>) -> Route {
    if let Some(Table(proxy)) = proxy.filter(|proxy| proxy.0.is_used()) {
        return Route::Proxy(backend::Proxy {
            url: proxy.url,
            ping_url: proxy.ping_url,
            fallback: proxy.fallback,
            check_interval: Duration::from_secs(proxy.check_interval.0),
            use_http: proxy.use_http,
            check_pause_elapsed: Duration::from_secs(proxy.check_pause_elapsed.0),
            dragonfly_scheduler_endpoint: proxy.dragonfly_scheduler_endpoint,
        });
    }
    let mirrors = mirrors.unwrap_or_default();
    if mirrors.is_empty() { Route::Direct } else { Route::Mirrors(mirrors.into_iter().map(mirror).collect()) }
}

fn mirror(Table(mirror): Table<Mirror>) -> backend::Mirror {
    backend::Mirror {
        host: mirror.host,
        ping_url: mirror.ping_url,
        headers: mirror.headers,
        health_check_interval: Duration::from_secs(mirror.health_check_interval.0),
        failure_limit: mirror.failure_limit.narrow(),
        health_check_pause_elapsed: Duration::from_secs(mirror.health_check_pause_elapsed.0),
    }
}

backend_table!(Localfs { blob_file: String, dir: String, alt_dirs: Vec<String> } |table: &Localfs, base: Base<'_>| {
    Source::Localfs {
        blob_file: base.resolve(&table.blob_file),
        dir: base.resolve(&table.dir),
        alt_dirs: base.resolve_all(&table.alt_dirs),
    }
});

backend_table!(Localdisk { device_path: String, disable_gpt: bool } |table: &Localdisk, base: Base<'_>| {
    Source::Localdisk { device_path: base.resolve(&table.device_path), disable_gpt: table.disable_gpt }
});

backend_table!(Oss {
    scheme: Option<Scheme>,
    endpoint: Endpoint,
    bucket_name: String,
    object_prefix: String,
    access_key_id: Secret,
    access_key_secret: Secret,
} |table: &Oss, _: Base<'_>| Source::Oss(backend::Bucket {
    scheme: table.scheme.unwrap_or(Scheme::Https),
    endpoint: table.endpoint.clone(),
    name: table.bucket_name.clone(),
    object_prefix: table.object_prefix.clone(),
    access_key_id: table.access_key_id.clone(),
    access_key_secret: table.access_key_secret.clone(),
}));

backend_table!(S3 {
    scheme: Option<Scheme>,
    endpoint: Endpoint,
    region: String,
    bucket_name: String,
    object_prefix: String,
    access_key_id: Secret,
    access_key_secret: Secret,
} |table: &S3, _: Base<'_>| Source::S3 {
    region: if table.region.is_empty() { "us-east-1".to_owned() } else { table.region.clone() },
    bucket: backend::Bucket {
        scheme: table.scheme.unwrap_or(Scheme::Https),
        endpoint: if table.endpoint.is_empty() { "s3.amazonaws.com".into() } else { table.endpoint.clone() },
        name: table.bucket_name.clone(),
        object_prefix: table.object_prefix.clone(),
        access_key_id: table.access_key_id.clone(),
        access_key_secret: table.access_key_secret.clone(),
    },
});

backend_table!(Registry {
    scheme: Option<Scheme>,
    host: Endpoint,
    repo: String,
    auth: Secret,
    registry_token: Secret,
    blob_url_scheme: Scheme,
    blob_redirected_host: Endpoint,
} |table: &Registry, _: Base<'_>| Source::Registry(backend::Registry {
    scheme: table.scheme.unwrap_or(Scheme::Https),
    host: table.host.clone(),
    repo: table.repo.clone(),
    auth: table.auth.clone(),
    registry_token: table.registry_token.clone(),
    blob_url_scheme: table.blob_url_scheme,
    blob_redirected_host: table.blob_redirected_host.clone(),
}));

backend_table!(HttpProxy { addr: Endpoint, path: String } |table: &HttpProxy, _: Base<'_>| {
    Source::HttpProxy { addr: table.addr.clone(), path: table.path.clone() }
});

/// The `localfs` table, or (in a published sample) just its directory as a string.
#[derive(Debug)]
pub(super) struct LocalfsOrDir(pub(super) Table<Localfs>);

impl<'de> Deserialize<'de> for LocalfsOrDir {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = LocalfsOrDir;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table, or a directory as a string")
            }
            fn visit_str<E: de::Error>(self, dir: &str) -> Result<LocalfsOrDir, E> {
                let only_dir = std::iter::once(("dir", dir));
                Table::deserialize(de::value::MapDeserializer::new(only_dir)).map(LocalfsOrDir)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<LocalfsOrDir, A::Error> {
                Table::deserialize(de::value::MapAccessDeserializer::new(map)).map(LocalfsOrDir)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A table that is there with its defaults when the key is missing or `null`.
#[derive(Debug)]
pub(super) struct OrEmpty<T>(pub(super) T);

impl<T: de::DeserializeOwned> Default for OrEmpty<T> {
    fn default() -> Self {
        let nothing = std::iter::empty::<(&str, &str)>();
        let table = T::deserialize(de::value::MapDeserializer::<_, de::value::Error>::new(nothing));
        Self(table.expect("every field of a table has a default"))
    }
}

impl<'de, T: de::DeserializeOwned> Deserialize<'de> for OrEmpty<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Nullable<T>(PhantomData<T>);
        impl<'de, T: de::DeserializeOwned> Visitor<'de> for Nullable<T> {
            type Value = OrEmpty<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }
            fn visit_none<E: de::Error>(self) -> Result<OrEmpty<T>, E> {
                Ok(OrEmpty::default())
            }
            fn visit_unit<E: de::Error>(self) -> Result<OrEmpty<T>, E> {
                Ok(OrEmpty::default())
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<OrEmpty<T>, D::Error> {
                T::deserialize(deserializer).map(OrEmpty)
            }
        }
        deserializer.deserialize_option(Nullable(PhantomData))
    }
}

/// `filecache` of v2, `config` of v1's cache.
#[derive(Debug, Deserialize)]
pub(super) struct CacheFiles {
    #[serde(default = "CacheFiles::here")]
    pub(super) work_dir: String,
    #[serde(default)]
    pub(super) disable_indexed_map: bool,
    #[serde(default)]
    pub(super) enable_encryption: bool,
    #[serde(default)]
    pub(super) enable_convergent_encryption: bool,
    #[serde(default)]
    pub(super) encryption_key: Secret,
}

impl Check for CacheFiles {
    fn check(&self) -> Result<(), String> {
        let is_needed = self.enable_encryption && !self.enable_convergent_encryption;
        let is_given = !self.encryption_key.is_empty();
        if (is_needed || is_given) && CacheKey::from_hex(&self.encryption_key).is_none() {
            return Err("invalid `encryption_key`, expected 64 hex digits whose halves differ".to_owned());
        }
        Ok(())
    }
}

impl CacheFiles {
    fn here() -> String {
        ".".to_owned()
    }
}

/// How metadata is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The bootstrap file is mapped.
    #[default]
    Direct,
    /// The bootstrap is copied once into a sealed memory file.
    Cached,
}

choice!(Mode { "direct" => Direct, "cached" => Cached });

/// The kinds of cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum CacheKind {
    #[default]
    None,
    Files,
    Fscache,
}

choice!(CacheKind {
    "blobcache" => Files,
    "filecache" => Files,
    "fscache" => Fscache,
    "dummycache" => None,
    "" => None,
});
