//! Where the blobs of an image come from: the configured backend, those of external blobs, and the bootstrap's own file.

use std::path::Path;
use std::sync::Arc;

use tracing::warn;

use super::DaemonError;
use super::assembly::Served;
use crate::config::Backend as BackendConfig;
use crate::config::Config;
use crate::config::Source;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::MetaHolder;
use crate::rafs::facts::feature;
use crate::rafs::meta;
use crate::storage::backend::Backend;
use crate::storage::backend::BackendError;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::backend::localfs::Place;
use crate::storage::backend::routed::Routed;
use crate::storage::pool::Pool;

/// The places of one image.
pub(super) struct Backends {
    usual: Arc<LocalFs>,
    /// By blob, those that come from elsewhere.
    external: Vec<(String, Arc<LocalFs>)>,
    bootstrap: LocalFs,
}

impl Backends {
    /// The backends of `config`, for an image of `blobs` whose metadata is in the file `bootstrap`.
    ///
    /// # Errors
    /// [`DaemonError::Missing`] names the field.
    pub(super) fn open(
        config: &Config,
        blobs: &[BlobFacts],
        bootstrap: &Path,
        pool: &Arc<Pool>,
    ) -> Result<Self, DaemonError> {
        let mut external = Vec::new();
        for blob in blobs.iter().filter(|blob| blob.features & feature::EXTERNAL != 0) {
            if let Some(found) = config.external_backends.iter().find(|backend| backend.fits(&blob.id)) {
                let place = place_of(&found.backend)?;
                external.push((blob.id.clone(), Arc::new(LocalFs::new(place, Arc::clone(pool)))));
            }
        }
        let place = match &config.backend {
            _ if blobs.len() == external.len() => Place::Directories(Vec::new()),
            None => return Err(DaemonError::Missing("backend".to_owned())),
            Some(backend) => place_of(backend)?,
        };
        let usual = Arc::new(LocalFs::new(place, Arc::clone(pool)));
        let bootstrap = LocalFs::new(Place::File(bootstrap.to_owned()), Arc::clone(pool));
        Ok(Self { usual, external, bootstrap })
    }

    /// All of them as one.
    pub(super) fn joined(&self) -> Arc<dyn Backend> {
        let usual = Arc::clone(&self.usual) as Arc<dyn Backend>;
        if self.external.is_empty() {
            return usual;
        }
        let others = self.external.iter().map(|(id, files)| (id.clone(), Arc::clone(files) as Arc<dyn Backend>));
        Arc::new(Routed::new(usual, others.collect()))
    }

    /// Looks at every blob of a served image. One that is missing or cut is no matter where the cache holds all of it.
    ///
    /// # Errors
    /// [`DaemonError::Blob`] names the file.
    pub(super) fn check_blobs(&self, served: &Served) -> Result<(), DaemonError> {
        for blob in served.image().blobs() {
            match self.check_blob(blob) {
                Err(error) if served.store().is_full(blob.index) => {
                    warn!(blob = %blob.id, error = &error as &dyn std::error::Error, "served from the cache alone");
                }
                outcome => outcome.map_err(DaemonError::Blob)?,
            }
        }
        Ok(())
    }

    /// Whether the files with the chunks and with their table are long enough.
    fn check_blob(&self, blob: &BlobFacts) -> Result<(), BackendError> {
        let own = self.external.iter().find(|(id, _)| *id == blob.id);
        let files = own.map_or(&self.usual, |(_, files)| files);
        let Some(table) = &blob.meta else { return files.check(&blob.id, blob.data_bytes) };
        // A place that cannot be is in no file.
        let end = meta::stored_range(blob).map_or(u64::MAX, |range| range.end);
        match &table.holder {
            MetaHolder::Blob => files.check(&blob.id, blob.data_bytes.max(end)),
            MetaHolder::Other(id) => {
                files.check(&blob.id, blob.data_bytes)?;
                self.usual.check(id, end)
            }
            MetaHolder::Bootstrap => {
                files.check(&blob.id, blob.data_bytes)?;
                self.bootstrap.check("bootstrap", end)
            }
        }
    }
}

/// Where the files of a localfs backend are.
///
/// # Errors
/// [`DaemonError::Missing`] names the field; [`DaemonError::BackendNotBuilt`] for other kinds.
pub fn place_of(backend: &BackendConfig) -> Result<Place, DaemonError> {
    if let Some(field) = backend.missing_field() {
        return Err(DaemonError::Missing(field.to_owned()));
    }
    match &backend.source {
        Source::Localfs { blob_file: Some(file), .. } => Ok(Place::File(file.clone())),
        Source::Localfs { dir, alt_dirs, .. } => Ok(Place::Directories(dir.iter().chain(alt_dirs).cloned().collect())),
        _ => Err(DaemonError::BackendNotBuilt(backend.kind())),
    }
}
