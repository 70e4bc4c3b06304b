//! `nydus-image`: makes RAFS images.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use nydus_vm::builder;
use nydus_vm::builder::Built;
use nydus_vm::cli::image::Cli;
use nydus_vm::cli::image::Create;
use nydus_vm::cli::image::progress::Display;
use serde_json::json;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    start_log(cli)?;
    let create = cli.command.create()?;
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

fn start_log(cli: &Cli) -> anyhow::Result<()> {
    let writer = match &cli.log_file {
        None => BoxMakeWriter::new(std::io::stderr),
        Some(path) => {
            let path = match path.extension() {
                Some(_) => path.clone(),
                None => path.with_extension("log"),
            };
            let file = File::options().append(true).create(true).open(&path);
            BoxMakeWriter::new(file.with_context(|| format!("cannot open log file {path:?}"))?)
        }
    };
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::from(cli.log_level))
        .with_target(false)
        .with_ansi(false)
        .with_writer(writer)
        .init();
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the result of the command")]
fn print_summary(built: &Built) {
    let ids: Vec<&str> = built.blob.iter().map(|blob| blob.id.as_str()).collect();
    println!("Successfully built RAFS filesystem:");
    println!("meta blob path: {}", built.bootstrap.display());
    println!("data blob size: {:#x}", built.blob.as_ref().map_or(0, |blob| blob.bytes));
    println!("data blobs: {ids:?}");
}

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
