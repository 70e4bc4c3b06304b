//! What a tree must look like, and how a listing differs from it.

use std::collections::BTreeMap;

use anyhow::Result;
use anyhow::ensure;

/// Fields of a line, for messages.
const FIELDS: [&str; 12] =
    ["path", "type", "mode", "uid", "gid", "size", "nlink", "rdev", "mtime", "sha256", "target", "xattrs"];

/// Differences shown before the rest is only counted.
const SHOWN: usize = 20;

/// A tree as listed by [`crate::walk`] or by a reference image's `manifest.txt`.
#[derive(Clone, Debug)]
pub struct Manifest(BTreeMap<String, Vec<String>>);

impl Manifest {
    /// Reads lines of twelve fields; those that begin with `#` and empty ones are passed over.
    pub fn parse(text: &str) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let fields: Vec<String> = line.split('\t').map(str::to_owned).collect();
            ensure!(fields.len() == FIELDS.len(), "not a line of a listing: {line:?}");
            entries.insert(fields[0].clone(), fields);
        }
        ensure!(!entries.is_empty(), "the listing is empty");
        Ok(Self(entries))
    }

    /// The same tree without entries of one type.
    pub fn without_type(mut self, kind: &str) -> Self {
        self.0.retain(|_, fields| fields[1] != kind);
        self
    }

    /// The same tree with any time of its root: the image format drops it, a peer shows the directory's.
    pub fn with_any_root_time(mut self) -> Self {
        if let Some(root) = self.0.get_mut("/") {
            root[8] = "-".to_owned();
        }
        self
    }

    /// Fails with the differences where `seen` is another tree. `-` in a number or a time of what is expected
    /// stands for "not compared".
    pub fn compare(&self, seen: &Self) -> Result<()> {
        let mut differences = Vec::new();
        for (path, expected) in &self.0 {
            let Some(found) = seen.0.get(path) else {
                differences.push(format!("{path}: missing"));
                continue;
            };
            for (place, field) in FIELDS.iter().enumerate() {
                let open = expected[place] == "-" && matches!(*field, "size" | "mtime");
                if !open && expected[place] != found[place] {
                    differences.push(format!("{path}: {field} {} instead of {}", found[place], expected[place]));
                }
            }
        }
        differences
            .extend(seen.0.keys().filter(|path| !self.0.contains_key(*path)).map(|path| format!("{path}: extra")));
        let count = differences.len();
        differences.truncate(SHOWN);
        ensure!(count == 0, "{count} differences:\n{}", differences.join("\n"));
        Ok(())
    }
}
