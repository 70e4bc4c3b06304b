//! What is served: a tree and its image, and the plain copy to compare with.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::sys::view::View;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use tempfile::TempDir;

use crate::arguments::Arguments;
use crate::measure::Case;
use crate::workload::Random;

/// Bytes of a small file.
pub const SMALL_FILE_BYTES: usize = 3000;
/// Small files in a directory of them.
pub const FILES_PER_DIRECTORY: usize = 100;

/// How much there is of everything.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Bytes of `/big`.
    pub big_bytes: usize,
    /// Directories `/files/N`, each with [`FILES_PER_DIRECTORY`] small files.
    pub directories: usize,
    /// Entries of `/many`.
    pub entries: usize,
}

/// A tree, its image, and a cache that is warm.
pub struct Material {
    size: Size,
    home: PathBuf,
    tree: PathBuf,
    image: TestImage,
    _temporary: Option<TempDir>,
}

impl Material {
    /// Makes everything, or takes over what an earlier run left in `--work-dir`.
    pub fn make(arguments: &Arguments) -> Result<Self> {
        let size = match arguments.quick {
            true => Size { big_bytes: 32 << 20, directories: 20, entries: 5000 },
            false => Size { big_bytes: 128 << 20, directories: 100, entries: 100_000 },
        };
        let (home, temporary) = match &arguments.work_dir {
            Some(directory) => (directory.join(if arguments.quick { "quick" } else { "full" }), None),
            None => {
                let temporary = tempfile::tempdir()?;
                (temporary.path().to_path_buf(), Some(temporary))
            }
        };
        let (tree, folder) = (home.join("tree"), home.join("image"));
        if !folder.join("bootstrap").exists() {
            fs::create_dir_all(&tree).with_context(|| format!("make {}", tree.display()))?;
            fill(&tree, size)?;
            make::image(&tree, &folder, Compressor::Lz4Block, Digester::Blake3, 1 << 20);
        }
        let made = make::MadeImage { bootstrap: folder.join("bootstrap"), blobs: folder.join("blobs"), blob_id: None };
        let image = TestImage::made("bench", made, &folder);
        Ok(Self { size, tree, image, home, _temporary: temporary })
    }

    /// How much there is.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Where sockets, logs and caches may lie.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The plain tree.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    /// Its image.
    pub fn image(&self) -> &TestImage {
        &self.image
    }

    /// Time of one plain copy of what a request of `case` reads, from a mapped file in the page cache into buffers of
    /// which there are as many as requests in flight. `None` for requests that read no file.
    pub fn limit(&self, case: &Case) -> Result<Option<Duration>> {
        let Some(bytes) = case.workload.read_bytes() else { return Ok(None) };
        let file = File::open(self.tree.join("big"))?;
        let view = View::map_file(file.as_fd(), self.size.big_bytes as u64)?;
        let mut buffers = vec![vec![0u8; bytes]; case.depth];
        let mut random = Random::new(1);
        let places = (self.size.big_bytes / bytes) as u64;
        let mut copy = |count: u64, start: u64| -> Result<Duration> {
            let begin = Instant::now();
            for n in start..start + count {
                let place = if case.workload.is_random() { random.below(places) } else { n % places };
                let buffer = &mut buffers[n as usize % case.depth];
                view.copy_at(place * bytes as u64, buffer)?;
                std::hint::black_box(&buffer[..]);
            }
            Ok(begin.elapsed())
        };
        // Page tables first, as the daemon has them when it is measured.
        copy(places, 0)?;
        let count = (places * 4).max(2000);
        let fastest = (0..3).map(|_| copy(count, 0)).collect::<Result<Vec<_>>>()?.into_iter().min();
        Ok(fastest.map(|time| time / count as u32))
    }
}

fn fill(tree: &Path, size: Size) -> Result<()> {
    fs::write(tree.join("big"), make::noise("big", size.big_bytes))?;
    for directory in 0..size.directories {
        let path = tree.join("files").join(directory.to_string());
        fs::create_dir_all(&path)?;
        for file in 0..FILES_PER_DIRECTORY {
            fs::write(path.join(file.to_string()), make::noise(&format!("{directory}/{file}"), SMALL_FILE_BYTES))?;
        }
    }
    make::big_directory(&tree.join("many"), size.entries)?;
    Ok(())
}
