//! Images that guests mount: reference images of upstream's tools, and images made by our own `nydus-image`.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use tempfile::TempDir;

use crate::manifest::Manifest;
use crate::peer::peer;
use crate::walk;

/// An image and the tree it must show.
#[derive(Debug)]
pub struct Image {
    bootstrap: PathBuf,
    blobs: PathBuf,
    expected: Manifest,
    /// The tree itself: where it was made by the test, or unpacked for a peer.
    source: Option<PathBuf>,
    /// Keeps what was made until the image is dropped.
    _scratch: Option<TempDir>,
}

/// The folder of reference images, where `NYDUS_REFERENCE_DIR` names one.
pub fn reference_directory() -> Option<PathBuf> {
    std::env::var_os("NYDUS_REFERENCE_DIR")
        .filter(|value| !value.is_empty())
        .map(|value| Path::new(&value).join("images"))
}

impl Image {
    /// The reference image `name`.
    pub fn reference(name: &str) -> Result<Self> {
        let folder = reference_directory().context("NYDUS_REFERENCE_DIR is not set")?.join(name);
        let text =
            std::fs::read_to_string(folder.join("manifest.txt")).with_context(|| format!("{name}/manifest.txt"))?;
        let mut image = Self {
            bootstrap: folder.join("bootstrap"),
            blobs: folder.join("blobs"),
            expected: Manifest::parse(&text)?,
            source: None,
            _scratch: None,
        };
        ensure!(image.bootstrap.is_file(), "{} is missing", image.bootstrap.display());
        if peer().is_some() {
            let scratch = tempfile::tempdir()?;
            let status = Command::new("tar")
                .args(["--xattrs", "--xattrs-include=*", "-xpf"])
                .arg(folder.join("source.tar"))
                .arg("-C")
                .arg(scratch.path())
                .status()?;
            ensure!(status.success(), "source.tar of {name} cannot be unpacked");
            // A tar holds no sockets.
            image.expected = image.expected.without_type("s");
            image.source = Some(scratch.path().to_path_buf());
            image._scratch = Some(scratch);
        }
        Ok(image)
    }

    /// An image of the tree that `fill` makes in an empty directory.
    pub fn made(fill: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let [source, blobs] = ["source", "blobs"].map(|name| scratch.path().join(name));
        std::fs::create_dir(&source)?;
        std::fs::create_dir(&blobs)?;
        fill(&source)?;
        let bootstrap = scratch.path().join("bootstrap");
        if peer().is_none() {
            let made = Command::new(env!("CARGO_BIN_EXE_nydus-image"))
                .args(["create", "-t", "dir-rafs"])
                .arg("-B")
                .arg(&bootstrap)
                .arg("-D")
                .arg(&blobs)
                .arg(&source)
                .output()
                .context("nydus-image")?;
            ensure!(made.status.success(), "nydus-image: {}", String::from_utf8_lossy(&made.stderr));
        }
        let expected = Manifest::parse(&walk::lines(&source)?.join("\n"))?.with_any_root_time();
        Ok(Self { bootstrap, blobs, expected, source: Some(source), _scratch: Some(scratch) })
    }

    /// The metadata file.
    pub fn bootstrap(&self) -> &Path {
        &self.bootstrap
    }

    /// The directory of data blobs.
    pub fn blobs(&self) -> &Path {
        &self.blobs
    }

    /// What a guest must see.
    pub fn expected(&self) -> &Manifest {
        &self.expected
    }

    /// The tree as plain files.
    pub fn source(&self) -> Result<&Path> {
        self.source.as_deref().context("this image has no plain tree")
    }
}
