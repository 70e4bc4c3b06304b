//! The command line of `nydus-image`: options of upstream 2.4.4, of which `create` for directories and `check` are built.
//!
//! What upstream knows and this program does not build is parsed and then refused with one line, so that a script
//! learns at once which of its options matters.

mod check;
mod progress;
mod run;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

pub use check::Check;
pub use run::run;

use crate::builder::ChunkBytes;
use crate::builder::Options;
use crate::builder::Target;
use crate::cli::LogLevel;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;

/// Make and check RAFS images.
#[derive(Debug, Parser)]
#[command(name = "nydus-image", version, propagate_version = true)]
pub struct Cli {
    /// Append the log to this file instead of stderr; ".log" is added when it has no extension.
    #[arg(short = 'L', long, global = true, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// What to log.
    #[arg(
        short = 'l',
        long,
        global = true,
        value_enum,
        default_value = "info",
        value_name = "LEVEL",
        ignore_case = true
    )]
    pub log_level: LogLevel,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands of `nydus-image`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build an image from a directory.
    Create(Box<Create>),
    /// Merge the images of several layers into one (not built yet).
    Merge(NotBuilt),
    /// Look for everything that is wrong with an image.
    Check(Check),
    /// Look around in the metadata of an image (not built yet).
    Inspect(NotBuilt),
    /// Statistics of chunks and duplicates (not built yet).
    Stat(NotBuilt),
    /// Rewrite blobs without chunks that nobody uses (not built yet).
    Compact(NotBuilt),
    /// Copy the chunks of listed files into a blob of their own (not built yet).
    Optimize(NotBuilt),
    /// Make a raw disk of an image (not built yet).
    Export(NotBuilt),
    /// Make a tar of an image (not built yet).
    Unpack(NotBuilt),
    /// Make a chunk dictionary of many images (not built yet).
    Chunkdict(NotBuilt),
}

/// Arguments of a subcommand that is refused whatever they are.
#[derive(Debug, Args)]
pub struct NotBuilt {
    /// Arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub arguments: Vec<OsString>,
}

/// Options of `create`.
#[derive(Debug, Args)]
pub struct Create {
    /// Directory to build from.
    pub source: PathBuf,
    /// What SOURCE is; only directories are built yet.
    #[arg(short = 't', long = "type", value_enum, default_value = "dir-rafs", value_name = "TYPE")]
    pub source_type: SourceType,
    /// File for the metadata; without it, it goes into the blob directory under its SHA-256.
    #[arg(short = 'B', long, value_name = "FILE", required_unless_present = "blob_dir")]
    pub bootstrap: Option<PathBuf>,
    /// Directory for the blob, which is named by its SHA-256.
    #[arg(short = 'D', long, value_name = "DIR", required_unless_present = "blob")]
    pub blob_dir: Option<PathBuf>,
    /// File for the blob.
    #[arg(short = 'b', long, value_name = "FILE", conflicts_with = "blob_dir")]
    pub blob: Option<PathBuf>,
    /// Size of chunks: a power of two from 4096 to 16777216, decimal or hexadecimal (0x...).
    #[arg(long, default_value = "0x100000", value_parser = parse_chunk_bytes, value_name = "BYTES")]
    pub chunk_size: ChunkBytes,
    /// How chunks are compressed.
    #[arg(long, value_enum, default_value = "zstd", value_name = "NAME")]
    pub compressor: CompressorName,
    /// How chunks are digested.
    #[arg(long, value_enum, default_value = "blake3", value_name = "NAME")]
    pub digester: DigesterName,
    /// Version of the image format; only 6 is built yet.
    #[arg(short = 'v', long, value_enum, default_value = "6", value_name = "VERSION")]
    pub fs_version: FsVersion,
    /// Write what was built to this file, as JSON.
    #[arg(short = 'J', long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,
    /// Options that are not built yet.
    #[command(flatten)]
    pub rest: NotBuiltOptions,
}

/// Options of upstream's `create` that a later version builds.
#[derive(Debug, Args)]
#[expect(missing_docs, reason = "upstream's documentation says what each is; here they are refused")]
pub struct NotBuiltOptions {
    #[arg(long, hide = true, value_name = "FILE")]
    pub external_blob: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub blob_inline_meta: bool,
    #[arg(long, hide = true)]
    pub blob_id: Option<String>,
    #[arg(long, hide = true)]
    pub blob_data_size: Option<String>,
    #[arg(long, hide = true, default_value = "0")]
    pub batch_size: String,
    #[arg(short = 'C', long, hide = true)]
    pub config: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub features: Option<String>,
    #[arg(long, hide = true)]
    pub chunk_dict: Option<String>,
    #[arg(long, hide = true)]
    pub parent_bootstrap: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub aligned_chunk: bool,
    #[arg(long, hide = true)]
    pub repeatable: bool,
    #[arg(long, hide = true, value_parser = ["oci", "overlayfs", "none"], default_value = "none")]
    pub whiteout_spec: String,
    #[arg(long, hide = true, value_parser = ["fs", "blob", "none"], default_value = "none")]
    pub prefetch_policy: String,
    #[arg(short = 'E', long, hide = true)]
    pub encrypt: bool,
    #[arg(long, hide = true)]
    pub blob_cache_dir: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub attributes: Option<PathBuf>,
}

impl NotBuiltOptions {
    /// The first option that asks for something.
    fn used(&self) -> Option<&'static str> {
        let options = [
            ("--external-blob", self.external_blob.is_some()),
            ("--blob-inline-meta", self.blob_inline_meta),
            ("--blob-id", self.blob_id.is_some()),
            ("--blob-data-size", self.blob_data_size.is_some()),
            ("--batch-size", !matches!(self.batch_size.as_str(), "0" | "0x0")),
            ("--config", self.config.is_some()),
            ("--features", self.features.is_some()),
            ("--chunk-dict", self.chunk_dict.is_some()),
            ("--parent-bootstrap", self.parent_bootstrap.is_some()),
            ("--aligned-chunk", self.aligned_chunk),
            ("--repeatable", self.repeatable),
            ("--whiteout-spec", self.whiteout_spec != "none"),
            ("--prefetch-policy", self.prefetch_policy != "none"),
            ("--encrypt", self.encrypt),
            ("--blob-cache-dir", self.blob_cache_dir.is_some()),
            ("--attributes", self.attributes.is_some()),
        ];
        options.into_iter().find_map(|(name, is_used)| is_used.then_some(name))
    }
}

/// What can be built from, as upstream names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "upstream's names")]
pub enum SourceType {
    Directory,
    DirRafs,
    EstargzRafs,
    EstargzRef,
    EstargztocRef,
    TarRafs,
    TarTarfs,
    TargzRafs,
    TargzRef,
    #[value(name = "stargz_index")]
    StargzIndex,
}

/// Compressors that can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum CompressorName {
    None,
    #[value(name = "lz4_block")]
    Lz4Block,
    Zstd,
}

impl CompressorName {
    /// The name as users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4Block => "lz4_block",
            Self::Zstd => "zstd",
        }
    }
}

impl From<CompressorName> for Compressor {
    fn from(name: CompressorName) -> Self {
        match name {
            CompressorName::None => Self::None,
            CompressorName::Lz4Block => Self::Lz4Block,
            CompressorName::Zstd => Self::Zstd,
        }
    }
}

/// Digest algorithms that can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum DigesterName {
    Blake3,
    Sha256,
}

impl From<DigesterName> for Digester {
    fn from(name: DigesterName) -> Self {
        match name {
            DigesterName::Blake3 => Self::Blake3,
            DigesterName::Sha256 => Self::Sha256,
        }
    }
}

/// Versions of the image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum FsVersion {
    #[value(name = "5")]
    V5,
    #[value(name = "6")]
    V6,
}

/// Something that upstream has and this program does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("nydus-image {0} is not built yet, only `check`, and `create` of a v6 image from a directory, are")]
pub struct NotBuiltYet(String);

impl Command {
    /// What is asked for, if it is built.
    ///
    /// # Errors
    /// What was asked for and is not built.
    pub fn built(&self) -> Result<Job<'_>, NotBuiltYet> {
        let name = match self {
            Self::Create(create) => return Ok(Job::Create(create)),
            Self::Check(check) => return Ok(Job::Check(check)),
            Self::Merge(_) => "merge",
            Self::Inspect(_) => "inspect",
            Self::Stat(_) => "stat",
            Self::Compact(_) => "compact",
            Self::Optimize(_) => "optimize",
            Self::Export(_) => "export",
            Self::Unpack(_) => "unpack",
            Self::Chunkdict(_) => "chunkdict",
        };
        Err(NotBuiltYet(name.to_owned()))
    }
}

/// A command that is built.
#[derive(Debug)]
pub enum Job<'a> {
    /// Build an image.
    Create(&'a Create),
    /// Check one.
    Check(&'a Check),
}

impl Create {
    /// The builder's options.
    ///
    /// # Errors
    /// What was asked for and is not built.
    pub fn options(&self) -> Result<Options, NotBuiltYet> {
        if !matches!(self.source_type, SourceType::Directory | SourceType::DirRafs) {
            let name = self.source_type.to_possible_value().expect("no type is skipped");
            return Err(NotBuiltYet(format!("create --type {}", name.get_name())));
        }
        if self.fs_version == FsVersion::V5 {
            return Err(NotBuiltYet("create --fs-version 5".to_owned()));
        }
        if let Some(option) = self.rest.used() {
            return Err(NotBuiltYet(format!("create {option}")));
        }
        let blob = match (&self.blob, &self.blob_dir) {
            (Some(file), _) => Target::File(file.clone()),
            (None, directory) => Target::Directory(directory.clone().expect("clap requires one of both")),
        };
        let bootstrap = match (&self.bootstrap, &self.blob_dir) {
            (Some(file), _) => Target::File(file.clone()),
            (None, directory) => Target::Directory(directory.clone().expect("clap requires one of both")),
        };
        let (compressor, digester) = (self.compressor.into(), self.digester.into());
        Ok(Options { compressor, digester, chunk_bytes: self.chunk_size, bootstrap, blob })
    }
}

fn parse_chunk_bytes(text: &str) -> Result<ChunkBytes, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    let bytes = parsed.map_err(|error| error.to_string())?;
    ChunkBytes::new(bytes).ok_or_else(|| "not a power of two from 4096 (0x1000) to 16777216 (0x1000000)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    fn create(line: &str) -> Result<Options, NotBuiltYet> {
        let cli = parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        match cli.command.built()? {
            Job::Create(create) => create.options(),
            Job::Check(check) => panic!("{check:?}"),
        }
    }

    #[test]
    fn create_with_documented_options_gives_them_to_the_builder() {
        let options = create(
            "nydus-image create -t dir-rafs -v 6 -B boot -D blobs --compressor lz4_block --digester sha256 \
             --chunk-size 0x4000 -J out.json src"
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_str(),
        );
        let expected = Options {
            compressor: Compressor::Lz4Block,
            digester: Digester::Sha256,
            chunk_bytes: ChunkBytes::new(0x4000).unwrap(),
            bootstrap: Target::File("boot".into()),
            blob: Target::Directory("blobs".into()),
        };
        assert_eq!(options, Ok(expected));
    }

    #[test]
    fn create_with_few_options_uses_upstreams_defaults() {
        let options = create("nydus-image create -D blobs src").unwrap();
        assert_eq!(options.compressor, Compressor::Zstd);
        assert_eq!(options.digester, Digester::Blake3);
        assert_eq!(options.chunk_bytes.get(), 1 << 20);
        assert_eq!(options.bootstrap, Target::Directory("blobs".into()));
    }

    #[test]
    fn wrong_usage_is_an_error_of_usage() {
        for line in [
            "nydus-image",
            "nydus-image create",
            "nydus-image create src",
            "nydus-image create -B boot src",
            "nydus-image create -b blob src",
            "nydus-image create -B boot -b blob -D blobs src",
            "nydus-image create -B boot -D blobs --compressor gzip src",
            "nydus-image create -B boot -D blobs --chunk-size 5000 src",
            "nydus-image create -B boot -D blobs --chunk-size 0x800 src",
            "nydus-image create -B boot -D blobs --chunk-size 33554432 src",
            "nydus-image create -B boot -D blobs --chunk-size ten src",
            "nydus-image create -B boot -D blobs -t zip src",
            "nydus-image create -B boot -D blobs --nonsense src",
            "nydus-image nonsense",
            "nydus-image check",
            "nydus-image check -B boot boot",
            "nydus-image check boot --data",
            "nydus-image check boot -D blobs -b blob",
        ] {
            assert_eq!(parse(line).map_err(|error| error.exit_code()).err(), Some(2), "{line}");
        }
    }

    #[test]
    fn what_is_not_built_is_named() {
        let check = |line: &str, named: &str| {
            let error = create(line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
            assert!(!error.contains('\n'), "{error}");
        };
        check("nydus-image create -t tar-rafs -B boot -D blobs src", "--type tar-rafs");
        check("nydus-image create -t stargz_index -B boot -D blobs src", "--type stargz_index");
        check("nydus-image create -v 5 -B boot -D blobs src", "--fs-version 5");
        check("nydus-image create --blob-inline-meta -B boot -D blobs src", "--blob-inline-meta");
        check("nydus-image create --batch-size 0x1000 -B boot -D blobs src", "--batch-size");
        check("nydus-image create --prefetch-policy fs -B boot -D blobs src", "--prefetch-policy");
        check("nydus-image create -E -B boot -D blobs src", "--encrypt");
        check("nydus-image merge -B boot a b", "merge");
        check("nydus-image chunkdict generate a", "chunkdict");
    }
}
