//! Configuration version 2 as it is written, and what it means.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::Cache;
use super::CacheStore;
use super::Config;
use super::ExternalBackend;
use super::ImageOptions;
use super::Overlay;
use super::Prefetch;
use super::Warnings;
use super::backend::Backend;
use super::strings;
use super::value::Check;
use super::value::Secret;
use super::value::Table;
use super::value::UpTo;
use super::wire::AmplifyBytes;
use super::wire::BackendTable as _;
use super::wire::Base;
use super::wire::CacheFiles;
use super::wire::CacheKind;
use super::wire::HttpProxy;
use super::wire::Kind;
use super::wire::Localdisk;
use super::wire::Localfs;
use super::wire::LocalfsOrDir;
use super::wire::Mode;
use super::wire::OrEmpty;
use super::wire::Oss;
use super::wire::Registry;
use super::wire::S3;

pub(super) fn one_mib() -> AmplifyBytes {
    UpTo(1 << 20)
}

#[derive(Debug, Deserialize)]
pub(super) struct Document {
    #[serde(rename = "version")]
    _version: UpTo<2>,
    #[serde(default)]
    id: String,
    backend: Option<Table<BackendChoice>>,
    #[serde(default)]
    external_backends: Vec<Table<External>>,
    cache: Option<Table<CacheTable>>,
    #[serde(default)]
    rafs: OrEmpty<Table<Rafs>>,
    overlay: Option<Table<OverlayTable>>,
}

#[derive(Debug, Deserialize)]
struct BackendChoice {
    #[serde(rename = "type")]
    kind: Kind,
    localfs: Option<LocalfsOrDir>,
    localdisk: Option<Table<Localdisk>>,
    oss: Option<Table<Oss>>,
    s3: Option<Table<S3>>,
    registry: Option<Table<Registry>>,
    #[serde(rename = "http-proxy")]
    http_proxy: Option<Table<HttpProxy>>,
}

#[derive(Debug, Deserialize)]
struct External {
    #[serde(default)]
    patch: BTreeMap<String, String>,
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(default)]
    config: BTreeMap<String, Secret>,
}

#[derive(Debug, Deserialize)]
struct CacheTable {
    #[serde(rename = "type", default)]
    kind: CacheKind,
    #[serde(default)]
    compressed: bool,
    #[serde(default)]
    validate: bool,
    #[serde(default)]
    prefetch: OrEmpty<Table<PrefetchTable>>,
    #[serde(default)]
    filecache: OrEmpty<Table<CacheFiles>>,
    #[serde(default)]
    fscache: OrEmpty<Table<CacheFiles>>,
}

#[derive(Debug, Deserialize)]
struct Rafs {
    #[serde(default)]
    mode: Mode,
    #[serde(default = "one_mib")]
    batch_size: AmplifyBytes,
    #[serde(default)]
    validate: bool,
    #[serde(default)]
    enable_xattr: bool,
    #[serde(default)]
    iostats_files: bool,
    #[serde(default)]
    access_pattern: bool,
    #[serde(default)]
    latest_read_files: bool,
    #[serde(default)]
    prefetch: OrEmpty<Table<PrefetchTable>>,
}

#[derive(Debug, Deserialize)]
struct PrefetchTable {
    #[serde(default)]
    enable: bool,
    #[serde(default = "PrefetchTable::default_threads")]
    threads: UpTo<1024>,
    #[serde(default = "one_mib")]
    batch_size: AmplifyBytes,
    #[serde(default = "PrefetchTable::no_limit")]
    bandwidth_limit: UpTo<{ u32::MAX as u64 }>,
    #[serde(default)]
    prefetch_all: bool,
    #[serde(default)]
    stream_prefetch: bool,
}

impl PrefetchTable {
    fn default_threads() -> UpTo<1024> {
        UpTo(8)
    }

    fn no_limit() -> UpTo<{ u32::MAX as u64 }> {
        UpTo(0)
    }

    fn prefetch(&self) -> Option<Prefetch> {
        self.enable.then(|| Prefetch {
            threads: self.threads.narrow(),
            batch_bytes: self.batch_size.narrow(),
            bandwidth_limit: self.bandwidth_limit.0,
            everything: self.prefetch_all,
            stream: self.stream_prefetch,
        })
    }
}

impl Check for PrefetchTable {
    fn check(&self) -> Result<(), String> {
        if self.enable && self.threads.0 == 0 {
            return Err("invalid `threads`: 0, expected an integer from 1 to 1024 when `enable` is true".to_owned());
        }
        Ok(())
    }
}

#[derive(Debug, Deserialize)]
struct OverlayTable {
    upper_dir: String,
    work_dir: String,
}

impl Check for Document {}

impl Check for BackendChoice {}

impl Check for External {
    fn check(&self) -> Result<(), String> {
        // What it means depends on the directory; whether it means anything does not.
        self.backend(Base(Path::new("/"))).map(drop).map_err(|error| format!("invalid `config`: {error}"))
    }
}

impl Check for CacheTable {}

impl Check for Rafs {}

impl Check for OverlayTable {}

impl Document {
    pub(super) fn into_config(self, base: Base<'_>, warnings: &mut Warnings) -> Config {
        let cache = self.cache.map(|table| table.0);
        let rafs = self.rafs.0.0;
        let in_cache = cache.as_ref().and_then(|cache| cache.prefetch.0.0.prefetch());
        Config {
            id: self.id,
            backend: self.backend.and_then(|choice| choice.0.into_backend(base, warnings)),
            external_backends: self
                .external_backends
                .into_iter()
                .map(|external| external.0.into_backend(base))
                .collect(),
            image: ImageOptions {
                mode: rafs.mode,
                amplify_bytes: rafs.batch_size.narrow(),
                validate: rafs.validate,
                xattr: rafs.enable_xattr,
                iostats_files: rafs.iostats_files,
                access_pattern: rafs.access_pattern,
                latest_read_files: rafs.latest_read_files,
            },
            prefetch: rafs.prefetch.0.0.prefetch().or(in_cache),
            cache: cache.map_or(Cache::none(), |cache| cache.into_cache(base)),
            overlay: self.overlay.map(|Table(overlay)| Overlay {
                upper_dir: base.join(&overlay.upper_dir),
                work_dir: base.join(&overlay.work_dir),
            }),
        }
    }
}

impl BackendChoice {
    fn into_backend(self, base: Base<'_>, warnings: &mut Warnings) -> Option<Backend> {
        let backend = match self.kind {
            Kind::Localfs => self.localfs.map(|table| table.0.0.backend(base)),
            Kind::Localdisk => self.localdisk.map(|table| table.0.backend(base)),
            Kind::Oss => self.oss.map(|table| table.0.backend(base)),
            Kind::S3 => self.s3.map(|table| table.0.backend(base)),
            Kind::Registry => self.registry.map(|table| table.0.backend(base)),
            Kind::HttpProxy => self.http_proxy.map(|table| table.0.backend(base)),
        };
        if backend.is_none() {
            let kind = self.kind.name();
            warnings.add(format!("`backend.{kind}` is missing, though `backend.type` is `{kind}`"));
        }
        backend
    }
}

impl External {
    fn backend(&self, base: Base<'_>) -> Result<Backend, strings::Error> {
        let config = &self.config;
        Ok(match self.kind {
            Kind::Localfs => strings::read::<Table<Localfs>>(config)?.0.backend(base),
            Kind::Localdisk => strings::read::<Table<Localdisk>>(config)?.0.backend(base),
            Kind::Oss => strings::read::<Table<Oss>>(config)?.0.backend(base),
            Kind::S3 => strings::read::<Table<S3>>(config)?.0.backend(base),
            Kind::Registry => strings::read::<Table<Registry>>(config)?.0.backend(base),
            Kind::HttpProxy => strings::read::<Table<HttpProxy>>(config)?.0.backend(base),
        })
    }

    fn into_backend(self, base: Base<'_>) -> ExternalBackend {
        let backend = self.backend(base).expect("checked when it was read");
        ExternalBackend { patch: self.patch, backend }
    }
}

impl CacheTable {
    fn into_cache(self, base: Base<'_>) -> Cache {
        let store = match self.kind {
            CacheKind::None => CacheStore::None,
            CacheKind::Files => CacheStore::files(self.filecache.0.0, base),
            CacheKind::Fscache => CacheStore::Fscache { work_dir: base.join(&self.fscache.0.0.work_dir) },
        };
        Cache { store, compressed: self.compressed, validate: self.validate }
    }
}
