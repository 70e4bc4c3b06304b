//! `nydus-image check`: everything that is wrong with an image, a line each, or what is in it.

use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::anyhow;
use clap::Args;
use serde_json::json;

use super::progress::Verified;
use super::progress::mib;
use crate::config::Config;
use crate::config::Mode;
use crate::config::Source;
use crate::daemon::BootstrapError;
use crate::daemon::bootstrap;
use crate::daemon::place_of;
use crate::limits::MAX_TABLE_BYTES;
use crate::rafs::RafsError;
use crate::rafs::check;
use crate::rafs::check::Blobs;
use crate::rafs::check::Finding;
use crate::rafs::check::Part;
use crate::rafs::check::Report;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::MetaHolder;
use crate::rafs::image::Image;
use crate::rafs::version::Version;
use crate::storage::audit::Audited;
use crate::storage::audit::BadChunk;
use crate::storage::audit::BlobFile;
use crate::storage::backend::localfs::Place;

/// Examples, and what to expect, below the options.
const HELP: &str = "\
Reads all of the metadata: superblock and tables, every inode, directory, name, link, attribute and chunk record; in v5
also the digests of the tree. With the blobs (-D or -b) their sizes and chunk tables too, and with --data every chunk is
decoded and verified. Each thing that is wrong is a line on stderr that names the field, its offset and the path; after
1000 of them it gives up. A superblock or table that is wrong hides what follows from it: repair that first.

Exit code 0: nothing is wrong; stdout says what is in the image. 1: something is. 2: usage.

Examples:
  nydus-image check bootstrap                     the metadata
  nydus-image check -B bootstrap -D blobs         and the chunk tables of its blobs
  nydus-image check bootstrap -D blobs --data     and every chunk
  nydus-image check blobs/<id>                    metadata that is inlined in a blob
  nydus-image check bootstrap -J report.json      as JSON for a program";

/// Options of `check`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Check {
    /// File with the metadata: a bootstrap, a blob with metadata inside, or an OCI bootstrap layer.
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap")]
    pub positional: Option<PathBuf>,
    /// The same, as an option.
    #[arg(short = 'B', long, value_name = "FILE", conflicts_with = "positional")]
    pub bootstrap: Option<PathBuf>,
    /// Directory of the blobs, by id: compare their sizes and chunk tables with the metadata.
    #[arg(short = 'D', long, value_name = "DIR", group = "blobs")]
    pub blob_dir: Option<PathBuf>,
    /// File of the only blob.
    #[arg(short = 'b', long, value_name = "FILE", group = "blobs")]
    pub blob: Option<PathBuf>,
    /// Configuration of a daemon, whose localfs backend says where the blobs are.
    #[arg(short = 'C', long, value_name = "FILE", group = "blobs")]
    pub config: Option<PathBuf>,
    /// Decode and verify every chunk.
    #[arg(long, requires = "blobs")]
    pub data: bool,
    /// Also say where each blob was found, and what was compared.
    #[arg(short = 'v', long)]
    pub verbose: bool,
    /// Write the outcome to this file, as JSON.
    #[arg(short = 'J', long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,
}

/// Everything that was found out.
struct Outcome {
    image: Option<Image>,
    findings: Vec<Finding>,
    report: Report,
    data: Option<Audited>,
    files: Vec<String>,
}

/// Runs a check.
///
/// # Errors
/// A file that is no image or cannot be read; something wrong with the image, after a line for each.
pub(super) fn run(options: &Check) -> anyhow::Result<()> {
    let path = options.bootstrap.as_deref().or(options.positional.as_deref()).expect("clap requires one of both");
    let place = options.place()?;
    let outcome = match bootstrap::open(path, Mode::Direct) {
        Ok(image) => look(image, path, place.as_ref(), options.data),
        Err(BootstrapError::Rafs(fault)) => Outcome::unopened(fault),
        Err(BootstrapError::View(fault)) => Outcome::unopened(fault.into()),
        Err(error) => return Err(anyhow::Error::new(error).context(format!("{path:?}"))),
    };
    if let Some(file) = &options.output_json {
        let text = format!("{:#}\n", outcome.json(path));
        std::fs::write(file, text).with_context(|| format!("cannot write {file:?}"))?;
    }
    let mut lines = String::new();
    if options.verbose {
        outcome.files.iter().for_each(|line| lines += &format!("{line}\n"));
    }
    if outcome.findings.is_empty() {
        lines += &outcome.summary();
        // Whether anybody reads it or not, the exit code tells.
        let _ = io::stdout().write_all(lines.as_bytes());
        return Ok(());
    }
    let _ = io::stdout().write_all(lines.as_bytes());
    let told: String = outcome.findings.iter().map(|finding| format!("{}: {finding}\n", path.display())).collect();
    let _ = io::stderr().write_all(told.as_bytes());
    let more = if outcome.report.gave_up { " or more" } else { "" };
    let count = outcome.findings.len();
    let things = if count == 1 { "thing is" } else { "things are" };
    Err(anyhow!("{path:?}: {count}{more} {things} wrong with the image, fetch or build it again"))
}

impl Check {
    /// Where blobs are looked for; `None`: nowhere.
    fn place(&self) -> anyhow::Result<Option<Place>> {
        match (&self.blob, &self.blob_dir, &self.config) {
            (Some(file), _, _) => Ok(Some(Place::File(file.clone()))),
            (_, Some(directory), _) => Ok(Some(Place::Directories(vec![directory.clone()]))),
            (_, _, Some(config)) => configured(config).map(Some),
            (None, None, None) => Ok(None),
        }
    }
}

/// Where the localfs backend of a configuration has its blobs.
fn configured(file: &Path) -> anyhow::Result<Place> {
    let directory = std::env::current_dir().context("the current directory")?;
    let (config, warnings) = Config::load(file, &directory)?;
    warnings.iter().for_each(|warning| tracing::warn!("configuration: {warning}"));
    let backend = config.backend.filter(|backend| matches!(backend.source, Source::Localfs { .. }));
    let backend =
        backend.with_context(|| format!("{file:?} has no localfs backend: give the directory of the blobs with -D"))?;
    place_of(&backend).with_context(|| format!("{file:?}"))
}

fn look(image: Image, path: &Path, place: Option<&Place>, with_data: bool) -> Outcome {
    let mut findings = Vec::new();
    let mut files = Vec::new();
    let mut known = Blobs::default();
    let mut opened = Vec::new();
    let mut table_bytes = 0;
    for blob in image.blobs() {
        let found = place.and_then(|place| place.find(&blob.id)).map(|file| open_blob(&file, path, place, blob));
        let (file, table, faults) = found.unwrap_or_default();
        if let Some(file) = &file {
            let table = if table.is_some() { "chunk table read" } else { "no chunk table" };
            files.push(format!("blob {} is {}, {table}", blob.id, file.path().display()));
        }
        findings.extend(faults);
        table_bytes += table.as_ref().map_or(0, |_| blob.meta.as_ref().map_or(0, |meta| meta.uncompressed_bytes));
        if table.is_some() && table_bytes > MAX_TABLE_BYTES {
            files.push(format!("the chunk table of blob {} is not compared with the files: too much memory", blob.id));
        }
        known.tables.push(table.filter(|_| table_bytes <= MAX_TABLE_BYTES));
        opened.push(file);
    }
    let mut data = None;
    let mut bad = Vec::new();
    if with_data && let Ok(index) = image.chunk_index() {
        let total = image.blobs().iter().fold(0u64, |sum, blob| sum.saturating_add(blob.uncompressed_bytes));
        let mut display = Verified::new(total);
        let mut all = Audited::default();
        for ((blob, file), table) in image.blobs().iter().zip(&opened).zip(&known.tables) {
            let Some(file) = file else { continue };
            let table = match table {
                Some(table) => Some(table.clone()),
                // It was not kept, or is damaged, which was told.
                None => {
                    place.and_then(|place| place.find(&blob.id)).and_then(|file| open_blob(&file, path, place, blob).1)
                }
            };
            if blob.meta.is_some() && table.is_none() {
                continue;
            }
            let one = file.chunks(blob, table.as_ref(), &index, &mut |bytes| display.add(bytes));
            (all.chunks, all.bytes) = (all.chunks + one.chunks, all.bytes + one.bytes);
            all.unverified += one.unverified;
            bad.extend(one.bad);
        }
        data = Some(all);
    }
    known.damaged = bad.iter().map(|bad| (bad.blob, bad.chunk)).collect();
    let mut report = check::survey(&image, &known);
    findings.append(&mut report.findings);
    for BadChunk { blob, chunk, mut finding } in bad {
        finding.path = report.damaged.get(&(blob, chunk)).cloned();
        findings.push(finding);
    }
    Outcome { image: Some(image), findings, report, data, files }
}

type Opened = (Option<BlobFile>, Option<crate::rafs::meta::BlobMeta>, Vec<Finding>);

/// Opens a blob and reads its chunk table, which may be in another file.
fn open_blob(file: &Path, bootstrap: &Path, place: Option<&Place>, blob: &BlobFacts) -> Opened {
    let file = match BlobFile::open(file, blob) {
        Ok(file) => file,
        Err(finding) => return (None, None, vec![finding]),
    };
    let table = match blob.meta.as_ref().map(|meta| &meta.holder) {
        None => return (Some(file), None, Vec::new()),
        Some(MetaHolder::Blob) => file.table(blob),
        Some(MetaHolder::Bootstrap) => BlobFile::holder(bootstrap, blob).and_then(|holder| holder.table(blob)),
        Some(MetaHolder::Other(id)) => match place.and_then(|place| place.find(id)) {
            Some(path) => BlobFile::holder(&path, blob).and_then(|holder| holder.table(blob)),
            None => return (Some(file), None, Vec::new()),
        },
    };
    match table {
        Ok(table) => (Some(file), table, Vec::new()),
        Err(finding) => (Some(file), None, vec![finding]),
    }
}

impl Outcome {
    /// An image that cannot be opened.
    fn unopened(fault: RafsError) -> Self {
        let findings = vec![Finding::of_image(fault)];
        Self { image: None, findings, report: Report::default(), data: None, files: Vec::new() }
    }

    fn blobs(&self) -> &[BlobFacts] {
        self.image.as_ref().map_or(&[], Image::blobs)
    }

    /// What is in the image; upstream's lines first.
    fn summary(&self) -> String {
        let mut text = "RAFS filesystem metadata is valid, referenced data blobs:\n".to_owned();
        for blob in self.blobs() {
            text += &format!(
                "\t {}: {}, compressed data size {:#x}, compressed file size {:#x}, uncompressed file size {:#x}, \
                 chunks: {:#x}, features: {:#x}\n",
                blob.index,
                blob.id,
                blob.data_bytes,
                blob.compressed_bytes,
                blob.uncompressed_bytes,
                blob.chunk_count,
                blob.features
            );
        }
        let seen = &self.report.seen;
        text += &format!(
            "{} paths: {} directories, {} files of {} bytes in {} chunks, {} others\n",
            seen.paths,
            seen.directories,
            seen.files,
            seen.file_bytes,
            seen.chunks,
            seen.inodes.saturating_sub(seen.directories).saturating_sub(seen.files)
        );
        if let Some(data) = &self.data {
            text += &format!("{} chunks of the blobs verified, {}", data.chunks, mib(data.bytes));
            if data.unverified != 0 {
                text += &format!("; the image has neither digest nor checksum of {} of them", data.unverified);
            }
            text.push('\n');
        }
        text
    }

    fn json(&self, path: &Path) -> serde_json::Value {
        let findings: Vec<_> = self.findings.iter().map(finding_json).collect();
        let seen = &self.report.seen;
        let version = self.image.as_ref().map(|image| match image.version() {
            Version::V5 => "5",
            Version::V6 => "6",
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "bootstrap": path.to_string_lossy(),
            "blobs": self.blobs().iter().map(|blob| blob.id.as_str()).collect::<Vec<_>>(),
            "fs_version": version,
            "valid": self.findings.is_empty(),
            "gave_up": self.report.gave_up,
            "findings": findings,
            "seen": {
                "paths": seen.paths,
                "inodes": seen.inodes,
                "directories": seen.directories,
                "files": seen.files,
                "file_bytes": seen.file_bytes,
                "chunks": seen.chunks,
            },
            "data": self.data.as_ref().map(|data| json!({
                "chunks": data.chunks,
                "bytes": data.bytes,
                "unverified_chunks": data.unverified,
            })),
        })
    }
}

fn finding_json(finding: &Finding) -> serde_json::Value {
    let (part, blob) = match &finding.part {
        Part::Metadata => ("metadata", None),
        Part::ChunkTable(id) => ("chunk table", Some(id)),
        Part::Blob(id) => ("blob", Some(id)),
    };
    json!({
        "part": part,
        "blob": blob,
        "field": finding.field(),
        "offset": finding.offset(),
        "path": finding.shown_path(),
        "reason": finding.reason(),
    })
}
