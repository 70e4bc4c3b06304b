//! Good inputs to begin with: real images, and what the fake guest sends.

use std::path::Path;
use std::path::PathBuf;

use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::make;

/// Larger seeds slow every target down and show nothing new.
pub const SEED_BYTES: usize = 64 << 10;

/// A seed and what to call it.
pub type Seed = (String, Vec<u8>);

/// Writes what `make` makes to the directory that `FUZZ_SEEDS` names, if it is set. libFuzzer calls this before it reads
/// its corpus, so the two can be one directory.
pub fn write(make: fn() -> Vec<Seed>) {
    let Some(directory) = std::env::var_os("FUZZ_SEEDS").map(PathBuf::from) else { return };
    std::fs::create_dir_all(&directory).expect("the directory of seeds can be made");
    for (name, bytes) in make() {
        if bytes.len() <= SEED_BYTES {
            std::fs::write(directory.join(format!("seed-{name}")), bytes).expect("a seed can be written");
        }
    }
}

/// Every file below the reference images whose path from there `wanted` wants; empty where there are none.
pub fn references(wanted: impl Fn(&str) -> bool) -> Vec<Seed> {
    let Some(root) = std::env::var_os("NYDUS_REFERENCE_DIR") else { return Vec::new() };
    let root = Path::new(&root).join("images");
    let (mut found, mut pending) = (Vec::new(), vec![root.clone()]);
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).expect("the reference images can be read") {
            let path = entry.expect("the reference images can be read").path();
            let name = path.strip_prefix(&root).expect("it lies below").to_string_lossy().replace('/', "-");
            if path.is_dir() {
                pending.push(path);
            } else if wanted(&name) {
                found.push((name, std::fs::read(&path).expect("the reference images can be read")));
            }
        }
    }
    found
}

/// Images that this project's builder makes of small trees: their folders, for as long as the value lives.
pub fn built() -> (tempfile::TempDir, Vec<PathBuf>) {
    let scratch = tempfile::tempdir().expect("a directory for seeds can be made");
    let source = scratch.path().join("source");
    small_tree(&source).expect("a small tree can be made");
    let kinds =
        [("none", Compressor::None, 4096), ("lz4", Compressor::Lz4Block, 8192), ("zstd", Compressor::Zstd, 1 << 20)];
    let folders = kinds.map(|(name, compressor, chunk_bytes)| {
        let folder = scratch.path().join(name);
        make::image(&source, &folder, compressor, Digester::Blake3, chunk_bytes);
        folder
    });
    (scratch, folders.to_vec())
}

/// Little of everything.
pub fn small_tree(root: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(root.join("sub/deeper"))?;
    std::fs::write(root.join("text"), make::text("fuzz", 20_000))?;
    std::fs::write(root.join("noise"), make::noise("fuzz", 9000))?;
    std::fs::write(root.join("empty"), b"")?;
    std::fs::write(root.join("zeros"), [0; 12_288])?;
    std::fs::hard_link(root.join("text"), root.join("sub/hard"))?;
    std::os::unix::fs::symlink("../text", root.join("sub/link"))?;
    (0..20).try_for_each(|i| std::fs::write(root.join(format!("sub/deeper/{i:03}-{}", "x".repeat(200))), [i]))?;
    // Not every file system has attributes.
    let set = |name: &str, value: &[u8]| {
        let _ = std::process::Command::new("setfattr")
            .args(["-n", name, "-v", &String::from_utf8_lossy(value)])
            .arg(root.join("text"))
            .output();
    };
    set("user.one", b"1");
    Ok(())
}
