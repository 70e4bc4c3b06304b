//! From a command line to an image and an exit code.

use std::ffi::OsString;
use std::io;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use serde_json::json;

use super::Cli;
use super::Create;
use super::Job;
use super::check;
use super::progress::Display;
use crate::builder;
use crate::builder::Built;
use crate::cli::tell;
use crate::daemon::logging;

/// Runs `nydus-image` with `arguments`, the program's name first, and returns its exit code: 0 built, or nothing found to
/// be wrong; 1 an error (one line on stderr), or something wrong (one line each, and one more); 2 usage.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return tell("nydus-image", &error),
    };
    match start(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The exit code tells as well.
            let _ = writeln!(io::stderr(), "Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: &Cli) -> anyhow::Result<()> {
    logging::install(&logging::Options {
        level: cli.log_level.into(),
        file: cli.log_file.clone(),
        rotate_bytes: 0, // never
    })
    .context("log file")?;
    match cli.command.built()? {
        Job::Create(create) => build(create),
        Job::Check(options) => check::run(options),
    }
}

fn build(create: &Create) -> anyhow::Result<()> {
    let options = create.options()?;

    let start = Instant::now();
    let mut display = Display::new();
    let built = builder::create(&create.source, &options, &mut |progress| display.show(progress))?;
    drop(display);
    let took = start.elapsed();

    print_summary(&built);
    match &create.output_json {
        Some(path) => write_json(path, create, &built, took),
        None => Ok(()),
    }
}

fn print_summary(built: &Built) {
    let ids: Vec<&str> = built.blob.iter().map(|blob| blob.id.as_str()).collect();
    let summary = format!(
        "Successfully built RAFS filesystem:\nmeta blob path: {}\ndata blob size: {:#x}\ndata blobs: {ids:?}\n",
        built.bootstrap.display(),
        built.blob.as_ref().map_or(0, |blob| blob.bytes),
    );
    // The image is there, whoever reads this or does not.
    let _ = io::stdout().write_all(summary.as_bytes());
}

/// Upstream's keys. What it traces depends on its version; ours are the figures of the build.
fn write_json(path: &Path, create: &Create, built: &Built, took: Duration) -> anyhow::Result<()> {
    let ids: Vec<&str> = built.blob.iter().map(|blob| blob.id.as_str()).collect();
    let blob = built.blob.as_ref();
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "bootstrap": built.bootstrap.to_string_lossy(),
        "blobs": ids,
        "external_bootstrap": "",
        "external_blobs": [],
        "trace": {
            "consumed_time": { "total_build": took.as_secs_f64() },
            "registered_events": {
                "paths": built.paths,
                "data_bytes": built.data_bytes,
                "chunks": blob.map_or(0, |blob| blob.chunks),
                "blob_compressed_size": blob.map_or(0, |blob| blob.bytes),
                "blob_uncompressed_size": blob.map_or(0, |blob| blob.uncompressed_bytes),
            },
        },
        "fs_version": "6",
        "compressor": create.compressor.as_str(),
    });
    std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {path:?}"))
}
