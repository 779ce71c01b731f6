//! A real etcd: members of one cluster as processes, on loopback for tests of the arbiter alone, or in a network namespace of its own beside
//! a pair.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::netns::NetNs;
use super::network::Network;
use super::{Error, Node, Result, daemon, scene, sys, tools};

/// How long a member may take to serve.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The arbiter's address beside a pair, reachable from both hosts over cables of its own.
const SITE_IP: &str = "10.79.0.9";

/// Whether tests with etcd are to run: always, unless `FT_NO_ETCD=1` says that this host has none.
///
/// # Panics
/// If it is not installed and nobody said so.
#[must_use]
pub fn wanted() -> bool {
    scene::tool_wanted("etcd", "FT_NO_ETCD")
}

/// Certificates for members that show one and ask for one, as files in PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The members' certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Number of members.
    pub members: u16,
    /// TLS for clients.
    pub tls: Option<TlsFiles>,
    /// Life of an unused token in seconds.
    pub token_seconds: u32,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self { members: 1, tls: None, token_seconds: 300 }
    }
}

struct Member {
    name: String,
    log: PathBuf,
    client: String,
    flags: Vec<String>,
    child: Option<Child>,
}

/// A cluster. Its processes die with it, its files go with it.
pub struct Etcd {
    // Declared first: processes end before their namespace and files go.
    members: Vec<Member>,
    ns: Option<NetNs>,
    dir: TempDir,
}

/// An address in 127.0.0.0/8 that no other process of this host uses: two test processes need not agree on ports.
#[must_use]
pub fn own_loopback() -> Ipv4Addr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + high % 64, middle, low)
}

/// Two ports that nobody else in this process was given.
fn two_ports() -> (u16, u16) {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let first = NEXT.fetch_add(2, Ordering::Relaxed);
    (first, first + 1)
}

impl Etcd {
    /// Starts a cluster on loopback, and waits until every member serves.
    pub fn start(options: &EtcdOptions) -> Result<Self> {
        let places: Vec<(String, u16, u16)> = (0..options.members)
            .map(|_| {
                let (client, peer) = two_ports();
                (own_loopback().to_string(), client, peer)
            })
            .collect();
        Self::start_at(&places, options, None, &std::env::temp_dir())
    }

    fn start_at(
        places: &[(String, u16, u16)],
        options: &EtcdOptions,
        ns: Option<NetNs>,
        parent: &Path,
    ) -> Result<Self> {
        tools::require("etcd")?;
        let dir = tempfile::Builder::new()
            .prefix("ft-etcd-")
            .tempdir_in(parent)
            .map_err(Error::io("cannot make a directory for etcd"))?;
        let initial: Vec<String> =
            places.iter().zip(0..).map(|((ip, _, peer), n)| format!("m{n}=http://{ip}:{peer}")).collect();
        let initial = initial.join(",");
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let mut members = Vec::new();
        for ((ip, client, peer), n) in places.iter().zip(0..) {
            let name = format!("m{n}");
            let (client, peer) = (format!("{scheme}://{ip}:{client}"), format!("http://{ip}:{peer}"));
            let data = dir.path().join(&name);
            let mut flags: Vec<String> = [
                ("name", name.as_str()),
                ("data-dir", &data.display().to_string()),
                ("listen-client-urls", &client),
                ("advertise-client-urls", &client),
                ("listen-peer-urls", &peer),
                ("initial-advertise-peer-urls", &peer),
                ("initial-cluster", &initial),
                ("initial-cluster-state", "new"),
                ("auth-token-ttl", &options.token_seconds.to_string()),
            ]
            .map(|(flag, value)| format!("--{flag}={value}"))
            .to_vec();
            if let Some(TlsFiles { ca, cert, key }) = &options.tls {
                flags.push("--client-cert-auth".into());
                flags.extend(
                    [("trusted-ca-file", ca), ("cert-file", cert), ("key-file", key)]
                        .map(|(flag, path)| format!("--{flag}={}", path.display())),
                );
            }
            let log = dir.path().join(format!("{name}.log"));
            members.push(Member { name, log, client, flags, child: None });
        }
        let mut etcd = Self { members, ns, dir };
        let all: Vec<usize> = (0..etcd.members.len()).collect();
        etcd.start_members(&all)?;
        Ok(etcd)
    }

    /// The members' client URLs.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client.clone()).collect()
    }

    /// Starts members again after [`Self::kill`], and waits until they serve. What they had stored is still there.
    pub fn start_members(&mut self, which: &[usize]) -> Result<()> {
        let mut waiting = Vec::new();
        for &at in which {
            let member = &mut self.members[at];
            let log = File::options()
                .create(true)
                .append(true)
                .open(&member.log)
                .map_err(Error::io(format!("cannot open {}", member.log.display())))?;
            let from = log.metadata().map_err(Error::io("the log's length"))?.len();
            let also = log.try_clone().map_err(Error::io("cannot duplicate a descriptor"))?;
            let mut command = Command::new("etcd");
            // Its settings may come from the environment as well; these are ours alone.
            command.args(&member.flags).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
            command.stdin(Stdio::null()).stdout(log).stderr(also);
            let child = match &self.ns {
                Some(ns) => ns.spawn(command),
                None => {
                    sys::die_with_parent(&mut command);
                    command.spawn()
                }
            };
            member.child = Some(child.map_err(|e| tools::start_error("etcd", e))?);
            waiting.push((at, from));
        }
        waiting.into_iter().try_for_each(|(at, from)| self.wait_ready(at, from))
    }

    fn wait_ready(&mut self, at: usize, from: u64) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        let Member { name, log, child, .. } = &mut self.members[at];
        let from = usize::try_from(from).expect("a log in memory");
        loop {
            let text = fs::read(&*log).map_err(Error::io(format!("cannot read {}", log.display())))?;
            if String::from_utf8_lossy(&text[from..]).contains("ready to serve client requests") {
                return Ok(());
            }
            let child = child.as_mut().expect("just started");
            if let Some(status) = child.try_wait().map_err(Error::io("waiting for etcd"))? {
                let (name, status) = (format!("etcd {name}"), status.to_string());
                return Err(Error::Ended { name, status, tail: daemon::tail(log) });
            }
            if Instant::now() >= deadline {
                let (what, detail) = (format!("etcd {name} to serve"), daemon::tail(log));
                return Err(Error::Timeout { what, waited: START_LIMIT, detail });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to a member: SIGSTOP pauses it, SIGCONT lets it go on.
    ///
    /// # Panics
    /// If it was killed.
    pub fn signal(&self, at: usize, signal: Signal) -> Result<()> {
        let child = self.members[at].child.as_ref().expect("the member runs");
        daemon::signalled(child, signal).map_err(Error::io("cannot signal etcd"))
    }

    /// Kills a member as a crash would.
    pub fn kill(&mut self, at: usize) -> Result<()> {
        if let Some(mut child) = self.members[at].child.take() {
            child.kill().map_err(Error::io("cannot kill etcd"))?;
            child.wait().map_err(Error::io("waiting for etcd"))?;
        }
        Ok(())
    }

    /// The last lines of every member's log.
    #[must_use]
    pub fn logs(&self) -> String {
        self.members
            .iter()
            .map(|member| format!("--- etcd {} ---\n{}", member.name, daemon::tail(&member.log)))
            .collect()
    }

    /// Where data and logs are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for at in 0..self.members.len() {
            // Fails only when it has ended already.
            let _gone = self.kill(at);
        }
    }
}

/// The third site beside a pair's two hosts: etcd, with a cable to each of them that the guest LAN and the replication link know nothing of.
pub struct ArbiterSite {
    etcd: Etcd,
}

impl ArbiterSite {
    /// The table `[arbiter]` of the pair's configuration.
    #[must_use]
    pub fn table() -> String {
        format!(
            "# The arbiter is a third namespace on cables of its own.\n\
             [arbiter]\nkind = \"etcd\"\nendpoints = [\"http://{SITE_IP}:2379\"]\ninsecure_lab = true\n"
        )
    }

    /// Lays the cables and starts a single member; its files go below `dir`.
    pub fn start(network: &Network, dir: &Path) -> Result<Self> {
        let ns = NetNs::new("arbiter")?;
        ns.ip(&format!(
            "link add arb type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             addr add {SITE_IP}/24 dev arb\n\
             link set arb up\n"
        ))?;
        for (node, address) in [(Node::A, "10.79.0.1"), (Node::B, "10.79.0.2")] {
            let host = network.host(node);
            ns.ip(&format!(
                "link add arb-{node} type veth peer name arb0 netns {}\n\
                 link set arb-{node} master arb up\n",
                host.path().display()
            ))?;
            host.ip(&format!("addr add {address}/24 dev arb0\nlink set arb0 up\n"))?;
        }
        let places = [(SITE_IP.to_owned(), 2379, 2380)];
        Ok(Self { etcd: Etcd::start_at(&places, &EtcdOptions::default(), Some(ns), dir)? })
    }

    /// The etcd process.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// Stops the process; its kernel still takes connections, but nobody answers.
    pub fn pause(&self) -> Result<()> {
        self.etcd.signal(0, Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.etcd.signal(0, Signal::CONT)
    }

    /// Cuts or mends a host's cable to the arbiter.
    pub fn set_cable(&self, node: Node, up: bool) -> Result<()> {
        let ns = self.etcd.ns.as_ref().expect("the site is in a namespace");
        ns.ip(&format!("link set arb-{node} {}\n", if up { "up" } else { "down" }))
    }
}
