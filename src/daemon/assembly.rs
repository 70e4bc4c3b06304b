//! Parts into a served image: metadata, store, file system, device tree, FUSE server.

use std::path::Path;
use std::sync::Arc;

use tracing::info;
use tracing::warn;

use super::DaemonError;
use super::bootstrap;
use crate::config::CacheEncryption;
use crate::config::CacheStore;
use crate::config::Config;
use crate::config::Source;
use crate::fs::image::ImageFs;
use crate::fs::image::Xattrs;
use crate::fuse::server::Server;
use crate::limits::POOL_PATIENCE;
use crate::metrics::Metrics;
use crate::rafs::image::Image;
use crate::storage::backend::Backend;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::backend::localfs::Place;
use crate::storage::pool::Pool;
use crate::storage::store::CacheForm;
use crate::storage::store::Index;
use crate::storage::store::LazyChunks;
use crate::storage::store::Store;
use crate::storage::store::StoreOptions;
use crate::vfs::Mounts;
use crate::vfs::Policy;
use crate::vfs::Vfs;
use crate::vfs::ZeroMessageOpen;

/// What a served image is made of.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The file with the metadata.
    pub bootstrap: &'a Path,
    /// How it is served and cached. Its backend is not looked at.
    pub config: &'a Config,
    /// Where blobs come from.
    pub backend: Arc<dyn Backend>,
    /// Threads of storage.
    pub pool: Arc<Pool>,
    /// Which boot of the machine this is.
    pub boot_id: [u8; 16],
    /// Whether guests open files without a message.
    pub zero_message_open: ZeroMessageOpen,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A served image: ready to be put behind a device. Dropping it answers all parked reads and ends the pool.
pub struct Served {
    server: Arc<Server<Vfs>>,
    store: Arc<Store>,
    image: Arc<Image>,
    pool: Arc<Pool>,
}

impl Served {
    /// The FUSE server, for a transport.
    pub fn server(&self) -> Arc<Server<Vfs>> {
        Arc::clone(&self.server)
    }

    /// Where its data comes from.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its metadata.
    pub fn image(&self) -> &Image {
        &self.image
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.store.shutdown();
        self.pool.shutdown(POOL_PATIENCE);
    }
}

/// Puts the parts together. Reads the metadata, verifies its tree if the configuration says so, and opens the cache:
/// blocks on the disk, and for a large v5 tree that is verified for as long as reading it takes.
///
/// # Errors
/// [`DaemonError::Bootstrap`], [`DaemonError::Store`].
pub fn assemble(parts: Parts<'_>) -> Result<Served, DaemonError> {
    let image = Arc::new(open_image(parts.bootstrap, parts.config)?);
    serve_image(image, parts)
}

/// The second half of [`assemble`], for an image that is open.
pub(super) fn serve_image(image: Arc<Image>, parts: Parts<'_>) -> Result<Served, DaemonError> {
    let options = StoreOptions {
        work_dir: match &parts.config.cache.store {
            CacheStore::Files { work_dir, .. } => Some(work_dir.clone()),
            CacheStore::None | CacheStore::Fscache { .. } => None,
        },
        form: cache_form(parts.config),
        index: match &parts.config.cache.store {
            CacheStore::Files { disable_indexed_map: true, .. } => Index::None,
            _ => Index::Map,
        },
        boot_id: parts.boot_id,
        amplify_bytes: parts.config.image.amplify_bytes.into(),
        validate: parts.config.cache.validate || parts.config.image.validate,
        demand_deadline: match &parts.config.backend {
            Some(backend) => Some(backend.demand_deadline).filter(|deadline| !deadline.is_zero()),
            None => Some(crate::limits::DEMAND_DEADLINE),
        },
        pool: Arc::clone(&parts.pool),
        bootstrap: Some(Arc::new(LocalFs::new(Place::File(parts.bootstrap.to_owned()), Arc::clone(&parts.pool)))),
    };
    let indexed = Arc::clone(&image);
    let chunks = Arc::new(LazyChunks::new(move || indexed.chunk_index()));
    let blobs = image.blobs().to_vec();
    let store = Arc::new(Store::open(options, blobs, chunks, parts.backend, Arc::clone(&parts.metrics))?);
    let xattrs = if parts.config.image.xattr { Xattrs::Served } else { Xattrs::Hidden };
    let fs = ImageFs::new(Arc::clone(&image), Arc::clone(&store), xattrs);
    let policy = Policy { zero_message_open: parts.zero_message_open, mounts: Mounts::Fixed };
    let server = Arc::new(Server::new(Vfs::new(fs, policy), parts.metrics));
    Ok(Served { server, store, image, pool: parts.pool })
}

/// How chunks are kept in the cache directory.
fn cache_form(config: &Config) -> CacheForm {
    match &config.cache.store {
        CacheStore::Files { encryption: Some(CacheEncryption::Convergent), .. } => CacheForm::Convergent,
        CacheStore::Files { encryption: Some(CacheEncryption::Key(key)), .. } => CacheForm::Encrypted(*key.expose()),
        _ if config.cache.compressed => CacheForm::Compressed,
        _ => CacheForm::Plain,
    }
}

/// Opens the metadata, and verifies the digests of its tree if `digest_validate` is set.
pub(super) fn open_image(path: &Path, config: &Config) -> Result<Image, DaemonError> {
    let wrong = |source| DaemonError::Bootstrap { path: path.to_owned(), source };
    let image = bootstrap::open(path, config.image.mode).map_err(wrong)?;
    if config.image.validate {
        image.verify_tree().map_err(|error| wrong(error.into()))?;
    }
    let (version, blobs) = (image.version(), image.blobs().len());
    info!(bootstrap = %path.display(), ?version, blobs, inodes = image.totals().inodes, "image opened");
    Ok(image)
}

/// Refuses what would change what is served and is not built, and warns of what only would change how.
///
/// # Errors
/// [`DaemonError::NotBuilt`].
pub(super) fn refuse_unbuilt(config: &Config) -> Result<(), DaemonError> {
    let not_built = |what: &str| Err(DaemonError::NotBuilt(what.to_owned()));
    if let Some(backend) = &config.backend
        && !matches!(backend.source, Source::Localfs { .. })
    {
        return Err(DaemonError::BackendNotBuilt(backend.kind()));
    }
    if let Some(external) =
        config.external_backends.iter().find(|e| !matches!(e.backend.source, Source::Localfs { .. }))
    {
        return Err(DaemonError::BackendNotBuilt(external.backend.kind()));
    }
    if config.overlay.is_some() {
        return not_built("`overlay`");
    }
    let mut without_effect = Vec::new();
    match &config.cache.store {
        CacheStore::Fscache { .. } => return not_built("cache `fscache`"),
        CacheStore::Files { encryption: Some(_), .. } if config.cache.compressed => {
            return not_built("encryption of a `compressed` cache");
        }
        CacheStore::Files { .. } | CacheStore::None => {}
    }
    for (is_set, what) in [
        (config.prefetch.is_some(), "prefetch"),
        (config.image.iostats_files, "iostats_files"),
        (config.image.access_pattern, "access_pattern"),
        (config.image.latest_read_files, "latest_read_files"),
    ] {
        if is_set {
            without_effect.push(what);
        }
    }
    if !without_effect.is_empty() {
        warn!("configured, and without effect: {}", without_effect.join(", "));
    }
    Ok(())
}
