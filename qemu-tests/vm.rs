//! A guest in QEMU: its command line, its boot, scripts run inside it, and its end.
//!
//! The guest's agent (`guest-images/init`) takes scripts over a virtserialport and sends back output and status.
//! Every wait has a deadline and ends early when QEMU does; an error shows the ends of the console and of QEMU's log.

use std::ffi::OsString;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::ErrorKind;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use anyhow::ensure;
use serde_json::Value;
use serde_json::json;
use tempfile::TempDir;

use crate::guest::Kernel;
use crate::qmp::Monitor;

/// From QEMU's start, or a guest's reboot, to the agent's first word: 3 s where nothing else runs.
const BOOT: Duration = Duration::from_secs(180);
/// How a guest of several processors can end under TCG while it boots: one of them meets a breakpoint by which the kernel
/// changes its own code, after another has finished that change. Hardware and KVM do not do this; no device is concerned.
const EMULATOR_FAULT: &str = "Oops: int3";
/// It was seen in one of some forty boots.
const BOOT_ATTEMPTS: u32 = 3;
/// For one script in a guest.
const SCRIPT: Duration = Duration::from_secs(300);
/// From `poweroff` to the end of QEMU.
const POWER_OFF: Duration = Duration::from_secs(60);
/// From a request to let go of memory to the guest's answer: it moves pages away under TCG.
const UNPLUG: Duration = Duration::from_secs(120);
const UNPLUG_ATTEMPTS: u32 = 5;
/// Lines of a log that an error shows: a kernel's whole report of an oops.
const SHOWN_LINES: usize = 60;
/// How often a wait looks whether QEMU still runs.
const TICK: Duration = Duration::from_millis(100);

/// Which QEMU command line is used.
#[derive(Clone, Debug)]
pub enum Line {
    /// As little hardware as possible: the fastest guest.
    Lean,
    /// The published one, but for accelerator, processor, memory size and paths, and with an initrd.
    Documented { disk: PathBuf },
    /// The published one without its options of the device: QEMU's and the daemon's defaults.
    DocumentedDefaults { disk: PathBuf },
}

/// Where the guest's first process comes from.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// The initramfs, whose agent takes scripts.
    Agent,
    /// The initramfs, which runs this script first; it ends by starting an agent elsewhere.
    Script(&'a str),
    /// `/init` on the root file system, which is the virtiofs device: no initramfs at all.
    RootOnVirtiofs,
}

/// What a reset of the guest does: a reboot, or a panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// QEMU ends, and so does the test.
    Ends,
    /// The machine starts again on the same connection to the daemon.
    Restarts,
}

/// What the lean guest's memory is made of.
#[derive(Clone, Debug)]
pub enum Memory {
    /// 512 MiB in a memory file.
    Fixed,
    /// 256 MiB in a memory file, and slots for more ([`Vm::plug`]).
    HotPlug,
    /// 512 MiB in a file of this directory, which is a hugetlbfs.
    HugePages(PathBuf),
}

/// A virtiofs device beside the first.
#[derive(Clone, Debug)]
pub struct Second {
    pub tag: &'static str,
    pub socket: PathBuf,
}

/// Everything a test decides about a guest.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    pub kernel: Kernel,
    pub line: Line,
    pub start: Start<'a>,
    pub reset: Reset,
    pub processors: u32,
    pub request_queues: u32,
    pub memory: Memory,
    pub second: Option<Second>,
}

impl<'a> Setup<'a> {
    /// The lean guest: one processor, one request queue, the agent in the initramfs.
    pub fn lean(kernel: Kernel) -> Self {
        let (line, start, reset, memory) = (Line::Lean, Start::Agent, Reset::Ends, Memory::Fixed);
        Self { kernel, line, start, reset, processors: 1, request_queues: 1, memory, second: None }
    }
}

/// A running guest; dropping it kills QEMU.
#[derive(Debug)]
pub struct Vm {
    qemu: Child,
    port: BufReader<UnixStream>,
    monitor: Option<Monitor>,
    directory: TempDir,
    /// The guest's `uname -r`.
    pub release: String,
}

impl Vm {
    /// Starts QEMU on the daemon's `socket` and waits for the agent. Boots again where the emulator ended the guest.
    pub fn boot(setup: &Setup<'_>, socket: &Path) -> Result<Self> {
        let mut attempt = 1;
        loop {
            match Self::boot_once(setup, socket) {
                Err(error) if attempt < BOOT_ATTEMPTS && format!("{error:#}").contains(EMULATOR_FAULT) => {
                    eprintln!("boot {attempt} ended with {EMULATOR_FAULT:?}, a fault of QEMU's emulation; once more");
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    fn boot_once(setup: &Setup<'_>, socket: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let listener = UnixListener::bind(directory.path().join("result.sock"))?;
        let arguments = arguments(setup, socket, directory.path())?;
        let log = File::create(directory.path().join("qemu.log"))?;
        let mut command = Command::new("qemu-system-x86_64");
        // The console of `-serial mon:stdio` is stdout.
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut qemu = command.spawn().context("qemu-system-x86_64")?;
        let port = match accept(&listener, &mut qemu) {
            Ok(port) => BufReader::new(port),
            Err(error) => {
                // Best effort: it is about to be reported that QEMU does not work.
                let _ = qemu.kill();
                let _ = qemu.wait();
                return Err(error.context(tails(directory.path())));
            }
        };
        let mut vm = Self { qemu, port, monitor: None, directory, release: String::new() };
        vm.await_agent()?;
        Ok(vm)
    }

    /// Waits for the agent's word after a boot or a reboot.
    pub fn await_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        loop {
            let line = self.line(deadline).context("the guest's agent does not come up")?;
            if let Some(release) = line.trim_end().strip_prefix("@ready ") {
                self.release = release.to_owned();
                return Ok(());
            }
        }
    }

    /// Runs a shell script in the guest; fails, with its output, where its status is not 0.
    pub fn run(&mut self, script: &str) -> Result<String> {
        self.send(script)?;
        let deadline = Instant::now() + SCRIPT;
        let mut output = String::new();
        loop {
            let line = self.line(deadline).with_context(|| format!("in {script:?}, after {output:?}"))?;
            if let Some(status) = line.strip_prefix("@exit=") {
                ensure!(status.trim_end() == "0", "{script:?} ended with {}:\n{output}", status.trim_end());
                // The agent puts a line feed before its status, in case the output ends without one.
                output.truncate(output.len().saturating_sub(1));
                return Ok(output);
            }
            output.push_str(&line);
        }
    }

    /// Hands a script to the guest and does not wait: for what ends with the guest gone.
    pub fn send(&mut self, script: &str) -> Result<()> {
        let port = self.port.get_mut();
        write!(port, "{}\n{script}", script.len()).context("the guest's port is closed")
    }

    /// A listing of the tree at `path` in the guest.
    pub fn walk(&mut self, path: &str) -> Result<crate::manifest::Manifest> {
        crate::manifest::Manifest::parse(&self.run(&format!("/bin/qemu-tests walk {path}"))?)
    }

    /// Puts a memory module of `bytes` into a slot: [`Memory::HotPlug`] only.
    pub fn plug(&mut self, name: &str, bytes: u64) -> Result<()> {
        let memory = format!("{name}-memory");
        let object = json!({ "qom-type": "memory-backend-memfd", "id": memory, "size": bytes, "share": true });
        self.monitor()?.execute("object-add", object)?;
        self.monitor()?.execute("device_add", json!({ "driver": "pc-dimm", "id": name, "memdev": memory }))?;
        Ok(())
    }

    /// Asks the guest to let go of a memory module, until it has.
    pub fn unplug(&mut self, name: &str) -> Result<()> {
        let monitor = self.monitor()?;
        for _ in 0..UNPLUG_ATTEMPTS {
            monitor.execute("device_del", json!({ "id": name }))?;
            let is_gone = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == name;
            // A guest may find a page that cannot be moved away just now, and says so.
            let is_refused = |event: &Value| event["event"] == "MEM_UNPLUG_ERROR" && event["data"]["device"] == name;
            let event = monitor.event(UNPLUG, |event| is_gone(event) || is_refused(event))?;
            if is_gone(&event) {
                monitor.execute("object-del", json!({ "id": format!("{name}-memory") }))?;
                return Ok(());
            }
        }
        bail!("the guest does not let go of its memory\n{}", tails(self.directory.path()))
    }

    fn monitor(&mut self) -> Result<&mut Monitor> {
        if self.monitor.is_none() {
            self.monitor = Some(Monitor::connect(&self.directory.path().join("qmp.sock"))?);
        }
        Ok(self.monitor.as_mut().expect("it was made above"))
    }

    /// Restarts the guest, on the same QEMU and the same connection to the daemon, and waits for its agent.
    pub fn reboot(&mut self) -> Result<()> {
        self.send("busybox reboot -f")?;
        self.await_agent()
    }

    /// Turns the guest off and waits until QEMU is gone.
    pub fn power_off(mut self) -> Result<()> {
        self.send("busybox poweroff -f")?;
        let deadline = Instant::now() + POWER_OFF;
        while Instant::now() < deadline {
            if let Some(status) = self.qemu.try_wait()? {
                ensure!(status.success(), "QEMU ended with {status}\n{}", tails(self.directory.path()));
                return Ok(());
            }
            std::thread::sleep(TICK);
        }
        bail!("QEMU does not end after poweroff\n{}", tails(self.directory.path()))
    }

    /// `kill -9` of QEMU, as when a host's out-of-memory killer takes it.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// The next line from the port, its line feed included.
    fn line(&mut self, deadline: Instant) -> Result<String> {
        let mut bytes = Vec::new();
        loop {
            match self.port.read_until(b'\n', &mut bytes) {
                Ok(_) if bytes.ends_with(b"\n") => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
                Ok(_) => return Err(anyhow!("the guest's port is closed\n{}", tails(self.directory.path()))),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
            if Instant::now() >= deadline {
                bail!("no answer in time\n{}", tails(self.directory.path()));
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Best effort: after `power_off` and `kill` it is gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Waits for QEMU's connection to the result port.
fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + BOOT;
    while Instant::now() < deadline {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(TICK))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("QEMU ended with {status}");
        }
        std::thread::sleep(TICK);
    }
    bail!("QEMU does not connect to its result port")
}

/// The ends of what QEMU and the guest's console wrote.
fn tails(directory: &Path) -> String {
    let mut text = String::new();
    for name in ["qemu.log", "console.log"] {
        let bytes = std::fs::read(directory.join(name)).unwrap_or_default();
        let content = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = content.lines().collect();
        let shown = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
        text.push_str(&format!("--- end of {name}\n{shown}\n"));
    }
    text
}

/// The words of a QEMU command line, in order.
struct Words(Vec<OsString>);

impl Words {
    /// Splits at spaces; paths with spaces go through [`Words::one`].
    fn add(&mut self, words: &str) {
        self.0.extend(words.split_whitespace().map(OsString::from));
    }

    fn one(&mut self, word: impl Into<OsString>) {
        self.0.push(word.into());
    }
}

fn arguments(setup: &Setup<'_>, socket: &Path, directory: &Path) -> Result<Vec<OsString>> {
    let mut words = Words(Vec::new());
    let socket = socket.display();
    let processors = setup.processors;
    let queues = match setup.request_queues {
        1 => String::new(),
        queues => format!(",num-request-queues={queues}"),
    };
    let documented = |words: &mut Words, disk: &Path, device: &str| {
        words.add("-M pc");
        words.add(accelerator());
        words.add(&format!("-smp {processors} -m 512M,maxmem=16G"));
        words.add("-object memory-backend-file,id=mem,size=512M,mem-path=/dev/shm,share=on -numa node,memdev=mem");
        words.add(&format!("-chardev socket,id=char0,path={socket}"));
        words.add(&format!("-device vhost-user-fs-pci,chardev=char0,tag=nydus{device}{queues}"));
        words.add("-serial mon:stdio -vga none -nographic");
        words.add("-device virtio-net-pci,netdev=net0,mac=AE:AD:BE:EF:6C:FB -netdev type=user,id=net0");
        words.add(&format!("-qmp unix:{}/qmp.sock,server,nowait", directory.display()));
        words.add(&format!("-drive if=virtio,file={}", disk.display()));
    };
    let mut command_line = match &setup.line {
        Line::Lean => {
            words.add("-nodefaults -no-user-config -nographic");
            words.add(accelerator());
            words.add(&format!("-smp {processors} -machine q35,memory-backend=mem"));
            words.add(&memory(&setup.memory));
            words.add(&format!("-qmp unix:{}/qmp.sock,server=on,wait=off", directory.display()));
            words.add(&format!("-serial file:{}/console.log", directory.display()));
            words.add(&format!("-chardev socket,id=char0,path={socket}"));
            words.add(&format!("-device vhost-user-fs-pci,chardev=char0,tag=nydus,queue-size=1024{queues}"));
            if let Some(Second { tag, socket }) = &setup.second {
                words.add(&format!("-chardev socket,id=char1,path={}", socket.display()));
                words.add(&format!("-device vhost-user-fs-pci,chardev=char1,tag={tag},queue-size=1024"));
            }
            // What a guest without KVM need not spend its time on.
            "console=ttyS0 quiet mitigations=off nokaslr tsc=reliable no_timer_check".to_owned()
        }
        Line::Documented { disk } => {
            documented(&mut words, disk, ",queue-size=1024,indirect_desc=false,event_idx=false");
            r#"console=ttyS0 root=/dev/vda1 virtio_fs.dyndbg="+pfl" fuse.dyndbg="+pfl""#.to_owned()
        }
        Line::DocumentedDefaults { disk } => {
            documented(&mut words, disk, "");
            r#"console=ttyS0 root=/dev/vda1 virtio_fs.dyndbg="+pfl" fuse.dyndbg="+pfl""#.to_owned()
        }
    };
    words.add(&format!("-chardev socket,id=result,path={}/result.sock", directory.display()));
    words.add("-device virtio-serial-pci -device virtserialport,chardev=result,name=result");
    if setup.reset == Reset::Ends {
        words.add("-no-reboot");
    }
    words.one("-kernel");
    words.one(setup.kernel.vmlinux()?);
    let script = match setup.start {
        Start::Script(script) => Some(script),
        Start::Agent | Start::RootOnVirtiofs => None,
    };
    if matches!(setup.start, Start::RootOnVirtiofs) {
        command_line.push_str(" rootfstype=virtiofs root=nydus ro init=/init");
    } else {
        words.one("-initrd");
        words.one(setup.kernel.initramfs(directory, script)?);
        command_line.push_str(" rdinit=/init");
    }
    // A panic resets at once.
    command_line.push_str(" panic=-1 reboot=t nydus.modules=virtio_blk");
    if matches!(setup.memory, Memory::HotPlug) {
        // Memory that came later is used at once, and only for what can be moved away again.
        command_line.push_str(" memhp_default_state=online_movable");
    }
    words.one("-append");
    words.one(command_line);
    Ok(words.0)
}

fn memory(memory: &Memory) -> String {
    match memory {
        Memory::Fixed => "-m 512M -object memory-backend-memfd,id=mem,size=512M,share=on".to_owned(),
        Memory::HotPlug => {
            "-m 256M,slots=4,maxmem=4G -object memory-backend-memfd,id=mem,size=256M,share=on".to_owned()
        }
        Memory::HugePages(directory) => {
            format!("-m 512M -object memory-backend-file,id=mem,size=512M,mem-path={},share=on", directory.display())
        }
    }
}

/// KVM where it really runs guests: the device can be there without the processor's help (nested, paravirtual
/// hypervisors), and a kernel hangs silently then.
fn accelerator() -> &'static str {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let opened = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if capable && opened { "-cpu host --enable-kvm" } else { "-cpu max -accel tcg,thread=multi" }
}
