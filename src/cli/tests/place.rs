//! A directory with a small image, and daemons on it.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;

use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::process::DaemonProcess;
use tempfile::TempDir;

/// What the file `greeting` in the image holds.
pub const GREETING: &[u8] = b"hello, guest\n";

/// An image with its configuration, in a directory that vanishes with it.
pub struct Place {
    home: TempDir,
}

impl Place {
    /// Builds the image, and writes a configuration for it.
    pub fn new() -> Self {
        let place = Self { home: tempfile::tempdir().unwrap() };
        let tree = place.path("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("greeting"), GREETING).unwrap();
        fs::create_dir(place.path("blobs")).unwrap();
        let built = Command::new(env!("CARGO_BIN_EXE_nydus-image"))
            .args(["create", "--log-level", "error", "-B"])
            .arg(place.path("boot"))
            .arg("-D")
            .arg(place.path("blobs"))
            .arg(&tree)
            .output()
            .unwrap();
        assert!(built.status.success(), "{built:?}");
        place.write_config(&place.config(""));
        place
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The socket that [`Place::arguments`] name.
    pub fn socket(&self) -> PathBuf {
        self.path("s.sock")
    }

    /// The only blob of the image.
    pub fn blob(&self) -> PathBuf {
        fs::read_dir(self.path("blobs")).unwrap().next().unwrap().unwrap().path()
    }

    /// The text of a configuration, with `more` members at its end.
    pub fn config(&self, more: &str) -> String {
        format!(
            "{{\"device\": {{\"backend\": {{\"type\": \"localfs\", \"config\": {{\"dir\": {:?}}}}}, \
             \"cache\": {{\"type\": \"blobcache\", \"config\": {{\"work_dir\": {:?}}}}}}}, \
             \"enable_xattr\": true{more}}}",
            self.path("blobs"),
            self.path("cache")
        )
    }

    /// Replaces the configuration.
    pub fn write_config(&self, text: &str) {
        fs::write(self.path("config.json"), text).unwrap();
    }

    /// The documented arguments.
    pub fn arguments(&self) -> Vec<String> {
        let path = |name| self.path(name).to_str().unwrap().to_owned();
        let pairs = [("--config", "config.json"), ("--sock", "s.sock"), ("--bootstrap", "boot")];
        pairs.into_iter().flat_map(|(option, name)| [option.to_owned(), path(name)]).collect()
    }

    /// `nydusd` in this directory.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
        command.args(arguments).current_dir(self.home.path()).env_remove("RUST_LOG").env_remove("IMAGE_PULL_AUTH");
        command
    }

    /// Runs `nydusd` to its end, which must come by itself.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Starts `nydusd` with the documented arguments and `more`.
    pub fn start(&self, more: &[&str]) -> DaemonProcess {
        let mut arguments = self.arguments();
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        DaemonProcess::start(self.command(arguments), &self.socket(), &self.path("log")).unwrap()
    }
}

/// Reads the greeting through `guest`.
pub fn greeting(guest: &mut Guest) -> Vec<u8> {
    let entry = guest.call(&Request::lookup(1, b"greeting")).unwrap().body().unwrap();
    let node = EntryReply::from_lookup(&entry).unwrap().node;
    guest.call(&Request::read(node, 0, 0, 4096)).unwrap().body().unwrap()
}

/// Names of the files in `directory`.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}
