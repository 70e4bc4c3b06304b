//! The daemons that are measured, and how each is started.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use anyhow::bail;
use nydus_vm::testing::process::DaemonProcess;

use crate::arguments::Arguments;
use crate::material::Material;

/// A daemon to measure.
#[derive(Debug)]
pub struct Daemon {
    /// What to call it.
    pub name: String,
    template: String,
}

const OURS: &str = "nydusd";
const C_VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

impl Daemon {
    /// All that the command line asks for; ours first.
    pub fn all(arguments: &Arguments) -> Result<Vec<Self>> {
        let new = |name: &str, template: String| Self { name: name.to_owned(), template };
        let mut all = Vec::new();
        if !arguments.without_ours {
            let command = "--config {config} --sock {sock} --bootstrap {bootstrap} --log-level warn --rlimit-nofile 0";
            all.push(new(OURS, format!("{} {command}", env!("CARGO_BIN_EXE_nydusd"))));
        }
        if arguments.with_peers {
            if Path::new(C_VIRTIOFSD).exists() {
                let options =
                    "-f --socket-path={sock} -o source={dir} -o cache=always -o sandbox=chroot --rlimit-nofile=0";
                all.push(new("virtiofsd-c", format!("{C_VIRTIOFSD} {options}")));
            }
            let in_path =
                std::env::var_os("PATH").into_iter().flat_map(|p| std::env::split_paths(&p).collect::<Vec<_>>());
            if let Some(path) = in_path.map(|dir| dir.join("virtiofsd")).find(|file| file.exists()) {
                let options = "--socket-path={sock} --shared-dir={dir} --cache=always --sandbox=none --rlimit-nofile=0";
                all.push(new("virtiofsd", format!("{} {options}", path.display())));
            }
        }
        for daemon in &arguments.daemons {
            let Some((name, template)) = daemon.split_once('=') else { bail!("--daemon {daemon}: no NAME= in front") };
            all.push(new(name, template.to_owned()));
        }
        if all.is_empty() {
            bail!("no daemon to measure");
        }
        Ok(all)
    }

    /// Whether it is the daemon of this project.
    pub fn is_ours(&self) -> bool {
        self.name == OURS
    }

    /// Whether it keeps a cache of its own that can be cold.
    pub fn has_cache(&self) -> bool {
        self.template.contains("{config}") || self.template.contains("{cache}")
    }

    /// Starts it over `material`, with the cache in `cache`, bound to `cpus`.
    pub fn start(&self, material: &Material, cache: &Path, cpus: &[usize]) -> Result<DaemonProcess> {
        let socket = material.home().join("bench.sock");
        let config = material.home().join("config.json");
        std::fs::write(&config, material.image().config(cache).to_string())?;
        let mut command = self.template.clone();
        for (hole, path) in [
            ("{sock}", socket.as_path()),
            ("{dir}", material.tree()),
            ("{bootstrap}", &material.image().bootstrap),
            ("{blobs}", &material.image().blobs),
            ("{config}", &config),
            ("{cache}", cache),
        ] {
            command = command.replace(hole, &path.to_string_lossy());
        }
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(format!("exec {command}"));
        let daemon = DaemonProcess::start(shell, &socket, &material.home().join(format!("{}.log", self.name)))?;
        daemon.pin(cpus)?;
        Ok(daemon)
    }
}
