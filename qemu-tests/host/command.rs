//! `nydus-image` as a process: exit codes, what it prints, and what it leaves.

use std::path::Path;
use std::process::Command;
use std::process::Output;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("create_prints_a_summary_and_writes_json", Ok(()), prints_a_summary),
        trial("failure_is_one_line_and_exit_code_1", Ok(()), failure_is_one_line),
        trial("wrong_usage_is_exit_code_2", Ok(()), wrong_usage),
        trial("log_goes_to_the_file_asked_for", Ok(()), log_file),
    ]
}

fn nydus_image(directory: &Path, arguments: &str) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    Ok(command.args(arguments.split_whitespace()).current_dir(directory).output()?)
}

/// A directory with a small tree in `src` and an empty directory `out`.
fn scratch() -> Result<tempfile::TempDir> {
    let scratch = tempfile::tempdir()?;
    std::fs::create_dir(scratch.path().join("src"))?;
    std::fs::create_dir(scratch.path().join("out"))?;
    std::fs::write(scratch.path().join("src/file"), "content")?;
    Ok(scratch)
}

fn prints_a_summary() -> Result<()> {
    let scratch = scratch()?;
    let output = nydus_image(scratch.path(), "create -B out/boot -D out --compressor lz4_block -J out/json src")?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    let json: Value = serde_json::from_slice(&std::fs::read(scratch.path().join("out/json"))?)?;
    let blob = json["blobs"][0].as_str().context("a blob id")?;
    ensure!(scratch.path().join("out").join(blob).is_file(), "{json}");
    let expected = [("bootstrap", "out/boot"), ("fs_version", "6"), ("compressor", "lz4_block")];
    ensure!(expected.iter().all(|(key, value)| json[*key] == *value), "{json}");
    ensure!(json["version"].is_string() && json["trace"].is_object(), "{json}");

    let stdout = String::from_utf8(output.stdout)?;
    let bytes = std::fs::metadata(scratch.path().join("out").join(blob))?.len();
    for line in
        ["meta blob path: out/boot", &format!("data blob size: {bytes:#x}"), &format!("data blobs: [\"{blob}\"]")]
    {
        ensure!(stdout.lines().any(|found| found == line), "no line {line:?} in {stdout}");
    }
    // No terminal: plain lines, and no control characters.
    let stderr = String::from_utf8(output.stderr)?;
    ensure!(stderr.contains("2 paths") && !stderr.contains('\x1b') && !stderr.contains('\r'), "{stderr:?}");
    Ok(())
}

fn failure_is_one_line() -> Result<()> {
    let scratch = scratch()?;
    for (arguments, named) in [
        ("create -B out/boot -D out missing", "\"missing\""),
        ("create -B out/boot -D missing src", "\"missing\""),
        ("create -B missing/boot -D out src", "\"missing\""),
        ("create -B out/boot -D out src/file", "src/file"),
        ("create -B out/boot -D out -J missing/json src", "\"missing/json\""),
        ("create -B out/boot -D out -t tar-rafs src", "--type tar-rafs"),
        ("create -B out/boot -D out -v 5 src", "--fs-version 5"),
        ("check nothing-here", "nothing-here"),
        ("merge -B out/boot a b", "merge"),
        ("-L missing/log create -D out src", "missing/log.log"),
    ] {
        let output = nydus_image(scratch.path(), &format!("-l error {arguments}"))?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1), "{arguments}: {:?}", output.status);
        ensure!(stderr.lines().count() == 1 && stderr.contains(named), "{arguments}: {stderr}");
    }
    Ok(())
}

fn wrong_usage() -> Result<()> {
    let scratch = scratch()?;
    for arguments in ["", "nonsense", "create", "create -D out --chunk-size 5 src", "create -D out -b blob src"] {
        let output = nydus_image(scratch.path(), arguments)?;
        ensure!(output.status.code() == Some(2), "{arguments:?}: {:?}", output.status);
    }
    ensure!(scratch.path().join("out").read_dir()?.next().is_none());
    Ok(())
}

fn log_file() -> Result<()> {
    let scratch = scratch()?;
    let output = nydus_image(scratch.path(), "create -L out/log -l debug -B out/boot -D out src")?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let log = std::fs::read_to_string(scratch.path().join("out/log.log"))?;
    ensure!(log.contains("INFO"), "{log}");
    Ok(())
}
