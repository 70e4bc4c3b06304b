//! An image as EROFS wants it: plain metadata, and a device for each blob.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nydus_vm::rafs::detect;
use nydus_vm::rafs::detect::Content;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::feature;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::sys::view::View;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::readback::Readback;

/// What the devices hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// The data of the blobs.
    Real,
    /// Nothing, where it would be.
    Holes,
}

/// What [`Readback`] does not decode.
const NOT_READ_BACK: u32 = feature::BATCH | feature::ZRAN | feature::ENCRYPTED | feature::TARFS;

/// An image, ready for the tools of EROFS.
#[derive(Debug)]
pub struct Subject {
    pub image: TestImage,
    /// Plain metadata.
    pub bootstrap: PathBuf,
    /// The metadata, opened by our reader.
    pub opened: Image,
    /// One file for each blob.
    pub devices: Vec<PathBuf>,
    pub data: Data,
    /// What our reader shows without a daemon, where it can read the blobs.
    pub entries: Option<Vec<Entry>>,
}

impl Subject {
    /// Prepares `image`, with what must be made in `scratch`.
    pub fn of(image: TestImage, scratch: &Path) -> Result<Self> {
        let bootstrap = plain_metadata(&image, scratch)?;
        let options = OpenOptions { placeholder_id: image.bootstrap.file_name().map(|id| id.to_string_lossy().into()) };
        let opened = Image::open(map(&bootstrap)?, &options)?;
        let devices: Vec<_> = (0..opened.blobs().len()).map(|blob| scratch.join(format!("device-{blob}"))).collect();
        let features = opened.blobs().iter().fold(0, |all, blob| all | blob.features);
        let (mut data, mut entries) = (Data::Real, None);
        if features & NOT_READ_BACK == 0 {
            let readback = Readback::open_with(&bootstrap, &options, &image.blobs)?;
            for (index, device) in devices.iter().enumerate() {
                readback.write_device(index, device)?;
            }
            entries = Some(readback.entries()?);
        } else if features & feature::TARFS != 0 {
            // The device of a tar is the tar.
            for (blob, device) in opened.blobs().iter().zip(&devices) {
                std::fs::copy(image.blobs.join(&blob.id), device)?;
            }
        } else {
            eprintln!("{}: nobody else here decodes its blobs; only metadata is compared", image.name);
            for (blob, device) in opened.blobs().iter().zip(&devices) {
                File::create(device)?.set_len(blob.uncompressed_bytes)?;
            }
            data = Data::Holes;
        }
        Ok(Self { image, bootstrap, opened, devices, data, entries })
    }

    /// `command` with the devices and the metadata.
    pub fn ask(&self, command: &str, arguments: &[String]) -> Result<Vec<u8>, Refused> {
        let mut command = Command::new(command);
        command.env("TZ", "UTC").args(arguments);
        command.args(self.devices.iter().map(|device| format!("--device={}", device.display())));
        let output = command.arg(&self.bootstrap).output().map_err(|error| Refused::Failed(error.to_string()))?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        // Versions before 1.6 know blocks of a page only.
        if stderr.contains("isn't supported on this platform") {
            return Err(Refused::Unsupported(stderr));
        }
        // Errors of a part are told, and do not always show in the exit code.
        if !output.status.success() || stderr.contains("<E>") {
            return Err(Refused::Failed(format!("{command:?}: {}: {stderr}", output.status)));
        }
        Ok(output.stdout)
    }

    /// `fsck.erofs` finds nothing wrong; with real data it reads all of it, too.
    pub fn is_accepted(&self) -> Result<()> {
        let arguments = if self.data == Data::Real { vec!["--extract".to_owned()] } else { Vec::new() };
        match self.ask("fsck.erofs", &arguments) {
            Ok(_) => Ok(()),
            Err(Refused::Unsupported(why)) => {
                eprintln!("SKIPPED {}: fsck.erofs of this machine: {why}", self.image.name);
                Ok(())
            }
            Err(Refused::Failed(why)) => bail!(why),
        }
    }
}

/// Why a tool gave no answer.
#[derive(Debug)]
pub enum Refused {
    /// It is too old for the image.
    Unsupported(String),
    /// The image, or the call, is wrong.
    Failed(String),
}

/// The image's metadata as a file of its own.
fn plain_metadata(image: &TestImage, scratch: &Path) -> Result<PathBuf> {
    let file = map(&image.bootstrap)?;
    let section = match detect::detect(&file)? {
        Content::Bootstrap(_) => return Ok(image.bootstrap.clone()),
        Content::Inside(section) => section,
        other => bail!("{}: {other:?}", image.bootstrap.display()),
    };
    let stored = file.vec_at(section.offset, section.compressed_bytes)?;
    let plain = match section.compressor {
        Compressor::None => stored,
        Compressor::Zstd => zstd::bulk::decompress(&stored, usize::try_from(section.uncompressed_bytes)?)?,
        other => bail!("metadata compressed with {other:?}"),
    };
    ensure!(plain.len() as u64 == section.uncompressed_bytes, "the metadata has another length");
    let path = scratch.join("metadata");
    std::fs::write(&path, plain)?;
    Ok(path)
}

fn map(path: &Path) -> Result<View> {
    let file = File::open(path).with_context(|| format!("{path:?}"))?;
    Ok(View::map_file(file.as_fd(), file.metadata()?.len())?)
}
