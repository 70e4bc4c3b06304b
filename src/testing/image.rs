//! Images for tests and benches, ready to be served: reference images of upstream's tools, and some made here.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use super::make::MadeImage;
use super::manifest;

/// An image and where its blobs are.
#[derive(Debug, Clone)]
pub struct TestImage {
    /// What to call it.
    pub name: String,
    /// The metadata: a bootstrap, or a blob that has it inside.
    pub bootstrap: PathBuf,
    /// Directory of the blobs.
    pub blobs: PathBuf,
    /// The folder with everything about it.
    pub folder: PathBuf,
}

impl TestImage {
    /// All reference images; `None`, with a word, when there are none on this machine.
    ///
    /// # Panics
    /// When the folder of the reference images is named but incomplete.
    pub fn references() -> Option<Vec<Self>> {
        let root = manifest::reference_images()?;
        let mut folders: Vec<_> = fs::read_dir(&root)
            .expect("the folder of the reference images can be read")
            .map(|entry| entry.expect("the folder of the reference images can be read").path())
            .filter(|path| path.join("manifest.txt").exists())
            .collect();
        folders.sort();
        let images: Vec<_> = folders.into_iter().map(Self::reference).collect();
        assert!(images.len() >= 25, "{} has {} images only", root.display(), images.len());
        Some(images)
    }

    /// The reference image called `name`; `None`, with a word, when there is none on this machine.
    pub fn named(name: &str) -> Option<Self> {
        Some(Self::reference(manifest::reference_images()?.join(name)))
    }

    fn reference(folder: PathBuf) -> Self {
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = folder.join("bootstrap");
        let bootstrap = if plain.exists() { plain } else { folder.join(inlined_metadata(&folder)) };
        Self { name, bootstrap, blobs: folder.join("blobs"), folder }
    }

    /// What the image must show.
    pub fn manifest(&self) -> Vec<manifest::Entry> {
        manifest::read(&self.folder)
    }

    /// An image that was made here; `name` is what to call it.
    pub fn made(name: &str, image: MadeImage, folder: &Path) -> Self {
        let MadeImage { bootstrap, blobs, .. } = image;
        Self { name: name.to_owned(), bootstrap, blobs, folder: folder.to_path_buf() }
    }

    /// The documented configuration for this image: localfs, and a cache in `work_dir`.
    pub fn config(&self, work_dir: &Path) -> serde_json::Value {
        serde_json::json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": self.blobs } },
                "cache": { "type": "blobcache", "config": { "work_dir": work_dir } },
            },
            "mode": "direct",
            "digest_validate": false,
            "enable_xattr": true,
        })
    }
}

/// "Metadata: `blobs/<id>` (inlined)." in the README of a reference image.
fn inlined_metadata(folder: &Path) -> String {
    let readme = fs::read_to_string(folder.join("README.md")).unwrap_or_default();
    let line = readme.lines().find(|line| line.starts_with("Metadata: "));
    let path = line.and_then(|line| line.split('`').nth(1));
    path.unwrap_or_else(|| panic!("{} does not say where its metadata is", folder.display())).to_owned()
}
