//! Configuration version 1 as it is written, and what it means: what the documentation, Kata and the snapshotter send.

use serde::Deserialize;

use super::Cache;
use super::CacheStore;
use super::Config;
use super::ImageOptions;
use super::Prefetch;
use super::v2::one_mib;
use super::value::Check;
use super::value::Table;
use super::value::UpTo;
use super::wire::AmplifyBytes;
use super::wire::BackendTable;
use super::wire::Base;
use super::wire::CacheFiles;
use super::wire::CacheKind;
use super::wire::Kind;
use super::wire::Mode;
use super::wire::OrEmpty;

/// `B` is the table of the backend that `device.backend.type` names: it is known before the document is read, since
/// the name may stand behind the table.
#[derive(Debug, Deserialize)]
#[serde(bound = "B: BackendTable")]
pub(super) struct Document<B> {
    device: Table<Device<B>>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    digest_validate: bool,
    #[serde(default)]
    iostats_files: bool,
    #[serde(default)]
    enable_xattr: bool,
    #[serde(default)]
    access_pattern: bool,
    #[serde(default)]
    latest_read_files: bool,
    #[serde(default = "one_mib")]
    amplify_io: AmplifyBytes,
    #[serde(default)]
    fs_prefetch: OrEmpty<Table<PrefetchTable>>,
}

#[derive(Debug, Deserialize)]
#[serde(bound = "B: BackendTable")]
struct Device<B> {
    #[serde(default)]
    id: String,
    backend: Table<BackendChoice<B>>,
    cache: Option<Table<CacheTable>>,
}

#[derive(Debug, Deserialize)]
#[serde(bound = "B: BackendTable")]
struct BackendChoice<B> {
    #[serde(rename = "type")]
    _kind: Kind,
    #[serde(default)]
    config: OrEmpty<Table<B>>,
}

#[derive(Debug, Deserialize)]
struct CacheTable {
    #[serde(rename = "type", default)]
    kind: CacheKind,
    #[serde(default)]
    compressed: bool,
    #[serde(default)]
    config: OrEmpty<Table<CacheFiles>>,
    #[serde(default)]
    prefetch_config: OrEmpty<Table<PrefetchTable>>,
}

#[derive(Debug, Deserialize)]
struct PrefetchTable {
    #[serde(default)]
    enable: bool,
    #[serde(default = "PrefetchTable::default_threads")]
    threads_count: UpTo<1024>,
    #[serde(default = "one_mib")]
    merging_size: AmplifyBytes,
    #[serde(default = "PrefetchTable::no_limit")]
    bandwidth_rate: UpTo<{ u32::MAX as u64 }>,
    #[serde(default = "PrefetchTable::everything")]
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

    /// The two versions differ here: v2 says false.
    fn everything() -> bool {
        true
    }

    fn prefetch(&self) -> Option<Prefetch> {
        self.enable.then(|| Prefetch {
            threads: self.threads_count.narrow(),
            batch_bytes: self.merging_size.narrow(),
            bandwidth_limit: self.bandwidth_rate.0,
            everything: self.prefetch_all,
            stream: self.stream_prefetch,
        })
    }
}

impl Check for PrefetchTable {
    fn check(&self) -> Result<(), String> {
        if self.enable && self.threads_count.0 == 0 {
            return Err(
                "invalid `threads_count`: 0, expected an integer from 1 to 1024 when `enable` is true".to_owned()
            );
        }
        Ok(())
    }
}

impl<B> Check for Document<B> {}

impl<B> Check for Device<B> {}

impl<B> Check for BackendChoice<B> {}

impl Check for CacheTable {}

impl<B: BackendTable> Document<B> {
    pub(super) fn into_config(self, base: Base<'_>) -> Config {
        let device = self.device.0;
        let cache = device.cache.map(|table| table.0);
        let in_cache = cache.as_ref().and_then(|cache| cache.prefetch_config.0.0.prefetch());
        Config {
            id: device.id,
            backend: Some(device.backend.0.config.0.0.backend(base)),
            external_backends: Vec::new(),
            image: ImageOptions {
                mode: self.mode,
                amplify_bytes: self.amplify_io.narrow(),
                validate: self.digest_validate,
                xattr: self.enable_xattr,
                iostats_files: self.iostats_files,
                access_pattern: self.access_pattern,
                latest_read_files: self.latest_read_files,
            },
            prefetch: self.fs_prefetch.0.0.prefetch().or(in_cache),
            cache: cache.map_or(Cache::none(), |cache| cache.into_cache(self.digest_validate, base)),
            overlay: None,
        }
    }
}

impl CacheTable {
    fn into_cache(self, validate: bool, base: Base<'_>) -> Cache {
        let store = match self.kind {
            CacheKind::None => CacheStore::None,
            CacheKind::Files => CacheStore::files(self.config.0.0, base),
            CacheKind::Fscache => CacheStore::Fscache { work_dir: base.join(&self.config.0.0.work_dir) },
        };
        Cache { store, compressed: self.compressed, validate }
    }
}
