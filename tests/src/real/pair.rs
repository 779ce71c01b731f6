//! Two hosts, their processes, and everything that a test or the demo does to them.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::artifacts::{Artifacts, GuestImage};
use super::client::{Writer, WriterConfig};
use super::daemon::{self, Daemon};
use super::events::{self, Event};
use super::network::{GUEST_IP, GUEST_MAC, GUEST_PORT, Network, TAP, Wire, replication_ip};
use super::resp::{Connection, Reply};
use super::status::Status;
use super::tools::{self, Finished};
use super::{Error, MachineKind, Node, Result, clock};

/// How often files and connections are looked at while something is waited for.
const POLL: Duration = Duration::from_millis(3);
/// How long the guest may take to boot and to be protected.
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// Where a host's images are, in its state directory.
const IMAGES: &str = "images";
/// How long `ftctl` may take.
const CTL_LIMIT: Duration = Duration::from_secs(20);

/// What the product does when `[epoch]` says nothing, in the words of [`PairOptions::epoch`].
pub const DEFAULT_EPOCH: &str = "latency=2ms";

/// What the pair is made of.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// KVM or model.
    pub machine: MachineKind,
    /// Guest RAM as `pair.toml` has it.
    pub memory: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// What is in `[epoch]`, in words: `25ms` is an interval, `latency=2ms` and `in_flight=3` are keys with their values.
    pub epoch: String,
    /// Words added to the guest's command line.
    pub cmdline: String,
    /// Bytes of each of the guest's disks; each side has an image of its own in its directory.
    pub disks: Vec<u64>,
    /// Images and maps of these hosts are on a file system of their own with so many bytes (see [`Pair::remount`]).
    pub disk_space: Vec<(Node, u64)>,
    /// The table `[arbiter]`; a file in the pair's directory when there is none.
    pub arbiter: Option<String>,
    /// Lines added to `pair.toml`, whole tables.
    pub extra: String,
    /// Where the pair's directory is made; the system's directory for temporary files when there is none.
    pub files: Option<PathBuf>,
}

impl PairOptions {
    /// What the demo uses without flags.
    #[must_use]
    pub fn new(machine: MachineKind) -> Self {
        Self {
            machine,
            memory: "256MiB".into(),
            vcpus: 1,
            epoch: DEFAULT_EPOCH.into(),
            cmdline: String::new(),
            disks: Vec::new(),
            disk_space: Vec::new(),
            arbiter: None,
            extra: String::new(),
            files: None,
        }
    }
}

/// Two hosts with their wires, a directory for their files, and the processes that run on them.
pub struct Pair {
    // Declared first: processes end before their namespaces and files go.
    a: Option<Daemon>,
    b: Option<Daemon>,
    network: Network,
    artifacts: Artifacts,
    dir: TempDir,
    config: PathBuf,
    env: Vec<(String, OsString)>,
}

impl Pair {
    /// Builds wires and files; starts nothing.
    pub fn prepare(artifacts: Artifacts, options: &PairOptions) -> Result<Self> {
        let network = Network::new()?;
        let parent = options.files.clone().unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new()
            .prefix("ft-pair-")
            .tempdir_in(parent)
            .map_err(Error::io("cannot make a directory for the pair's files"))?;
        for node in Node::BOTH {
            let state = dir.path().join(node.as_str());
            let images = state.join(IMAGES);
            fs::create_dir_all(&images).map_err(Error::io(format!("cannot make {}", images.display())))?;
            for (_, bytes) in options.disk_space.iter().filter(|(of, _)| *of == node) {
                network.host(node).mount_memory(&images, *bytes)?;
            }
            for (disk, bytes) in options.disks.iter().enumerate() {
                let path = network.host(node).seen_from_outside(&image_path(dir.path(), node, disk));
                let made = fs::File::create_new(&path).and_then(|file| file.set_len(*bytes));
                made.map_err(Error::io(format!("cannot make {}", path.display())))?;
            }
        }
        let config = dir.path().join("pair.toml");
        let text = config_text(dir.path(), artifacts.guest.as_ref(), options);
        fs::write(&config, text).map_err(Error::io(format!("cannot write {}", config.display())))?;
        Ok(Self { a: None, b: None, network, artifacts, dir, config, env: Vec::new() })
    }

    /// Starts the backup on B and the primary on A, and waits until the guest answers and is protected.
    pub fn start_protected(&mut self) -> Result<()> {
        self.start_backup(Node::B)?;
        self.start_primary(Node::A, &[])?;
        self.wait_guest(START_LIMIT)?;
        self.wait_protected(Node::A, START_LIMIT)?;
        // The owner is protected from the record on; its backup reads of it a moment later.
        self.wait_state(Node::B, "in_sync", START_LIMIT)
    }

    /// The wires.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The directory with `pair.toml`, the logs and both state directories.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `pair.toml`.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Writes another configuration beside `pair.toml`: the same with `from` replaced by `to`.
    ///
    /// # Panics
    /// If `from` is not in it.
    pub fn altered_config(&self, name: &str, from: &str, to: &str) -> Result<PathBuf> {
        let text = fs::read_to_string(&self.config).map_err(Error::io("cannot read pair.toml"))?;
        assert!(text.contains(from), "{from:?} is not in pair.toml");
        let path = self.dir.path().join(name);
        fs::write(&path, text.replace(from, to)).map_err(Error::io(format!("cannot write {}", path.display())))?;
        Ok(path)
    }

    /// A host's image of a disk.
    #[must_use]
    pub fn image(&self, node: Node, disk: usize) -> PathBuf {
        self.network.host(node).seen_from_outside(&image_path(self.dir.path(), node, disk))
    }

    /// A host's directory of images and maps.
    #[must_use]
    pub fn images(&self, node: Node) -> PathBuf {
        self.network.host(node).seen_from_outside(&self.dir.path().join(node.as_str()).join(IMAGES))
    }

    /// Changes the file system of a host's images, which must be one of its own: `size=BYTES`, `ro`, `rw`.
    pub fn remount(&self, node: Node, options: &str) -> Result<()> {
        self.network.host(node).remount(&self.dir.path().join(node.as_str()).join(IMAGES), options)
    }

    /// Waits until both hosts' images of a disk are equal, which they are soon after the guest became still; the first byte that differs if they never are.
    pub fn wait_equal_images(&self, disk: usize, limit: Duration) -> Result<Option<u64>> {
        let deadline = Instant::now() + limit;
        loop {
            let [a, b] = Node::BOTH.map(|node| self.image(node, disk));
            let differs = first_difference(&a, &b).map_err(Error::io("cannot read the images"))?;
            if differs.is_none() || Instant::now() >= deadline {
                return Ok(differs);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The programs.
    #[must_use]
    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// Sets a variable in the environment of every process that is started from now on; `None`: no longer.
    pub fn set_env(&mut self, name: &str, value: Option<OsString>) {
        self.env.retain(|(set, _)| set != name);
        self.env.extend(value.map(|value| (name.to_owned(), value)));
    }

    /// Starts `ft-primary` on a host, in place of what ran there.
    pub fn start_primary(&mut self, node: Node, flags: &[&str]) -> Result<()> {
        self.start_daemon(node, "ft-primary", flags)
    }

    /// Starts `ft-backup` on a host, in place of what ran there.
    pub fn start_backup(&mut self, node: Node) -> Result<()> {
        self.start_daemon(node, "ft-backup", &[])
    }

    fn start_daemon(&mut self, node: Node, program: &str, flags: &[&str]) -> Result<()> {
        let config = self.config.clone();
        self.start_with(node, program, &config, flags)
    }

    /// Starts a program on a host with a configuration of its own, in place of what ran there.
    pub fn start_with(&mut self, node: Node, program: &str, config: &Path, flags: &[&str]) -> Result<()> {
        *self.slot(node) = None;
        let mut command = Command::new(self.artifacts.program(program));
        command.arg("--config").arg(config).args(["--node", node.as_str()]).args(flags);
        command.env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        let daemon = Daemon::start(node, self.network.host(node), command, &self.log(node))?;
        *self.slot(node) = Some(daemon);
        Ok(())
    }

    fn slot(&mut self, node: Node) -> &mut Option<Daemon> {
        match node {
            Node::A => &mut self.a,
            Node::B => &mut self.b,
        }
    }

    /// The process on a host.
    ///
    /// # Panics
    /// If none was started there.
    pub fn daemon(&mut self, node: Node) -> &mut Daemon {
        self.slot(node).as_mut().expect("a process was started on this host")
    }

    fn log(&self, node: Node) -> PathBuf {
        self.dir.path().join(format!("{node}.log"))
    }

    /// Kills the process on a host as a crash would. Returns the time in microseconds.
    pub fn kill(&mut self, node: Node) -> Result<u64> {
        self.daemon(node).kill()
    }

    /// Kills a host as a power cut would: its cables go dead first, so that nobody hears its kernel close connections. Returns the
    /// time just before the first cable in microseconds.
    pub fn kill_host(&mut self, node: Node) -> Result<u64> {
        let at = clock::mono_us();
        self.network.cut(&[Wire::Replication, Wire::Lan(node)])?;
        self.kill(node)?;
        Ok(at)
    }

    /// Sends a signal to the process on a host.
    pub fn signal(&mut self, node: Node, signal: Signal) -> Result<()> {
        self.daemon(node).signal(signal)
    }

    /// The events of a host's process from `since_us` on.
    pub fn events(&self, node: Node, since_us: u64) -> Result<Vec<Event>> {
        events::read(&self.dir.path().join(node.as_str()).join("events.jsonl"), since_us)
    }

    /// Waits until a host's event log has an event as `wanted` from `since_us` on. Fails early when the process ends.
    pub fn wait_event(
        &mut self,
        node: Node,
        since_us: u64,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let deadline = Instant::now() + limit;
        loop {
            let log = self.events(node, since_us)?;
            if let Some(event) = log.iter().find(|event| wanted(event)) {
                return Ok(event.clone());
            }
            self.daemon(node).check()?;
            if Instant::now() >= deadline {
                let words: Vec<String> =
                    log.iter().map(|e| format!("{}:{}", e.event, e.to.as_deref().unwrap_or(""))).collect();
                let detail =
                    format!("events since: [{}]; its last lines:\n{}", words.join(" "), self.daemon(node).log_tail());
                return Err(Error::Timeout { what: format!("{what} on {node}"), waited: limit, detail });
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until the process on a host is in `state`: its last change went there.
    pub fn wait_state(&mut self, node: Node, state: &str, limit: Duration) -> Result<()> {
        let since = self.daemon(node).started_us();
        let deadline = Instant::now() + limit;
        loop {
            let log = self.events(node, since)?;
            let last = log.iter().rev().find(|e| e.event == "state");
            if last.is_some_and(|e| e.enters(state)) {
                return Ok(());
            }
            let stays = |e: &&Event| e.enters("fenced") && e.reason.as_deref() != Some("handed_over");
            if let Some(fenced) = last.filter(stays) {
                // It does not leave this state for a long time.
                let why = fenced.reason.as_deref().unwrap_or("no reason given");
                return Err(Error::answer(
                    format!("{node} is to be {state}"),
                    format!("it was fenced ({why});\n{}", self.logs()),
                ));
            }
            self.daemon(node).check()?;
            if Instant::now() >= deadline {
                let states: Vec<&str> = log.iter().filter_map(|e| e.to.as_deref()).collect();
                let detail = format!("states since: {states:?}; its last lines:\n{}", self.daemon(node).log_tail());
                return Err(Error::Timeout { what: format!("state {state} on {node}"), waited: limit, detail });
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until the guest on `owner` is protected by the other side.
    pub fn wait_protected(&mut self, owner: Node, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            // A primary whose backup has died waits for ever; say which one is to blame.
            for node in Node::BOTH {
                if let Some(daemon) = self.slot(node) {
                    daemon.check()?;
                }
            }
            let step = Duration::from_millis(200).min(deadline.saturating_duration_since(Instant::now()));
            match self.wait_state(owner, "protected", step) {
                Err(Error::Timeout { .. }) if Instant::now() < deadline => {}
                result => return result,
            }
        }
    }

    /// Runs `ftctl` against a host's process.
    pub fn ftctl(&self, node: Node, words: &[&str]) -> Result<Finished> {
        let mut command = Command::new(self.artifacts.program("ftctl"));
        command.arg("--config").arg(&self.config).args(["--node", node.as_str()]).args(words);
        tools::run(self.network.host(node), command, "", CTL_LIMIT)
    }

    /// Starts `ftctl` against a host's process and lets it run; what it says is dropped. It dies with the pair.
    pub fn start_ftctl(&self, node: Node, words: &[&str]) -> Result<Child> {
        let mut command = Command::new(self.artifacts.program("ftctl"));
        command.arg("--config").arg(&self.config).args(["--node", node.as_str()]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.network.host(node).spawn(command).map_err(|e| tools::start_error("ftctl", e))
    }

    /// What a host's process says about itself.
    pub fn status(&self, node: Node) -> Result<Status> {
        // The exit code tells the state; a document is there whatever it is.
        let said = self.ftctl(node, &["status", "--output", "json"])?;
        if said.stdout.trim().is_empty() {
            return said.success("ftctl status").and_then(|text| Status::parse(&text));
        }
        Status::parse(&said.stdout)
    }

    /// Connects to the guest and waits for its PONG, trying again until `limit`, or as long as a guest may boot that somebody brought.
    pub fn wait_guest(&self, limit: Duration) -> Result<Connection> {
        let limit = self.artifacts.guest.as_ref().map_or(limit, |guest| limit.max(guest.boot_limit));
        let deadline = Instant::now() + limit;
        loop {
            let tried = Connection::open(self.network.client(), Duration::from_secs(2)).and_then(|mut connection| {
                let pong = connection.call(&["PING"]).map_err(Error::io("PING"))?;
                match pong {
                    Reply::Simple(text) if text == "PONG" => Ok(connection),
                    other => Err(Error::answer("PING", format!("{other:?}"))),
                }
            });
            match tried {
                Ok(connection) => return Ok(connection),
                Err(e) if Instant::now() >= deadline => {
                    return Err(Error::Timeout {
                        what: "the guest's answer to PING".into(),
                        waited: limit,
                        detail: format!("{e}\n{}", self.logs()),
                    });
                }
                Err(_) => thread::sleep(POLL),
            }
        }
    }

    /// Starts the demo's client.
    pub fn start_writer(&self, config: WriterConfig) -> Result<Writer> {
        Writer::start(self.network.client(), config)
    }

    /// Runs a program in the client's namespace.
    pub fn run_client(&self, program: &str, words: &[&str], limit: Duration) -> Result<Finished> {
        let mut command = Command::new(program);
        command.args(words);
        tools::run(self.network.client(), command, "", limit)
    }

    /// The last lines of both logs, and where the rest is.
    #[must_use]
    pub fn logs(&self) -> String {
        let tail = |node| daemon::tail(&self.log(node));
        format!("--- a ---\n{}--- b ---\n{}", tail(Node::A), tail(Node::B))
    }

    /// Keeps the directory with the logs after this value is gone.
    pub fn keep_files(&mut self) {
        self.dir.disable_cleanup(true);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if thread::panicking() {
            self.keep_files();
            eprintln!("{}files of the pair: {}", self.logs(), self.dir.path().display());
        }
    }
}

/// The first byte in which two files differ.
fn first_difference(one: &Path, other: &Path) -> std::io::Result<Option<u64>> {
    let (mut one, mut other) = (fs::File::open(one)?, fs::File::open(other)?);
    let (mut left, mut right, mut at) = (vec![0; 1 << 20], vec![0; 1 << 20], 0);
    loop {
        let read = one.read(&mut left)?;
        if read == 0 {
            return Ok(None);
        }
        other.read_exact(&mut right[..read])?;
        if let Some(n) = left[..read].iter().zip(&right[..read]).position(|(a, b)| a != b) {
            return Ok(Some(at + u64::try_from(n).unwrap_or(0)));
        }
        at += u64::try_from(read).unwrap_or(0);
    }
}

fn image_path(dir: &Path, node: Node, disk: usize) -> PathBuf {
    dir.join(node.as_str()).join(IMAGES).join(format!("disk{disk}.img"))
}

/// `pair.toml` for two hosts in namespaces.
fn config_text(dir: &Path, guest: Option<&GuestImage>, options: &PairOptions) -> String {
    let PairOptions { machine, memory, vcpus, epoch, cmdline, disks, arbiter, extra, disk_space: _, files: _ } =
        options;
    let epoch: String = epoch.split_whitespace().map(epoch_line).collect();
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let path = |key: &str, path: &Path| format!("{key} = {:?}\n", path.display().to_string());
    let kernel = guest.map_or(String::new(), |guest| path("kernel", &guest.kernel));
    let initrd = guest.and_then(|guest| guest.initrd.as_deref()).map_or(String::new(), |file| path("initrd", file));
    let brought = guest.map_or("", |guest| guest.cmdline.as_str());
    let at = dir.display();
    let file = || format!("[arbiter]\nkind = \"file\"\npath = \"{at}/arbiter.json\"\n");
    let arbiter = arbiter.clone().unwrap_or_else(file);
    let mut text = format!(
        "[vm]\nname = \"demo\"\nid = \"0d5e0f7a-6b0e-4c55-9a0c-77000a10ca5e\"\nmachine = \"{machine}\"\nmemory = \"{memory}\"\nvcpus = {vcpus}\n\
         {kernel}{initrd}cmdline = \"ip={GUEST_IP}/24 gw=10.77.0.1 port={GUEST_PORT} {cmdline} {brought}\"\nmac = \"{mac}\"\n\n\
         [epoch]\n{epoch}\n\
         {arbiter}\n\
         # The replication link is a wire between two namespaces of one machine.\n[link]\ninsecure_lab = true\n\n"
    );
    for disk in 0..disks.len() {
        text.push_str(&format!("[[disk]]\nname = \"disk{disk}\"\n\n"));
    }
    for node in Node::BOTH {
        let ip = replication_ip(node);
        let images = (0..disks.len()).map(|disk| format!("disk{disk} = {:?}", image_path(dir, node, disk)));
        let images: Vec<String> = images.collect();
        let disks = if images.is_empty() { String::new() } else { format!("disks = {{ {} }}\n", images.join(", ")) };
        text.push_str(&format!(
            "[nodes.{node}]\nreplication = \"{ip}:7400\"\ntap = \"{TAP}\"\ncontrol = \"{at}/{node}/control.sock\"\n\
             health = \"127.0.0.1:7480\"\nconsole = \"{at}/{node}/console.log\"\nstate_dir = \"{at}/{node}\"\n{disks}\n"
        ));
    }
    text.push_str(extra);
    text
}

/// A word of [`PairOptions::epoch`] as a line.
fn epoch_line(word: &str) -> String {
    let (key, value) = word.split_once('=').unwrap_or(("interval", word));
    if value.bytes().all(|byte| byte.is_ascii_digit()) || ["true", "false"].contains(&value) {
        format!("{key} = {value}\n")
    } else {
        format!("{key} = {value:?}\n")
    }
}

#[cfg(test)]
mod tests {
    use failover::config::PairConfig;

    use super::*;

    #[test]
    fn the_default_here_is_the_products() {
        let epoch = |epoch: &str| {
            let options = PairOptions { epoch: epoch.into(), ..PairOptions::new(MachineKind::Model) };
            let text = config_text(Path::new("/tmp"), None, &options);
            PairConfig::parse(&text, "pair.toml", Path::new("/tmp")).map(|config| format!("{:?}", config.epoch))
        };
        assert_eq!(epoch(DEFAULT_EPOCH).unwrap(), epoch("").unwrap());
        assert_ne!(epoch("25ms").unwrap(), epoch("").unwrap());
    }
}
