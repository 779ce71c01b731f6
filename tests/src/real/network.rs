//! The wires between two hosts and a client: a guest LAN, and a replication link of its own.
//!
//! ```text
//!   host a                    client and switches                host b
//!   ftap0 ─ br0 ─ lan0 ──── lan-a ┐ lan ┌ lan-b ──── lan0 ─ br0 ─ ftap0
//!                                 └ 10.77.0.1/24
//!   10.78.0.1  repl0 ────── repl-a ─ repl ─ repl-b ────── repl0  10.78.0.2
//! ```
//! Both switches are bridges in the client's namespace. A cut takes a switch port down: the host sees its carrier go, as it
//! would with a real cable, and keeps its addresses.

use super::netns::NetNs;
use super::{Node, Result, tools};

/// Name of each host's tap device.
pub const TAP: &str = "ftap0";
/// The guest's address.
pub const GUEST_IP: &str = "10.77.0.10";
/// The guest's server port.
pub const GUEST_PORT: u16 = 6379;
/// The client's address on the guest LAN.
pub const CLIENT_IP: &str = "10.77.0.1";
/// The guest's network address, the same on both hosts.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x10];

/// A cable that can be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// The link between the hosts.
    Replication,
    /// One host's cable to the guest LAN.
    Lan(Node),
}

impl Wire {
    /// The switch port that this cable is plugged into.
    #[must_use]
    pub fn port(self) -> &'static str {
        match self {
            Self::Replication => "repl-a",
            Self::Lan(Node::A) => "lan-a",
            Self::Lan(Node::B) => "lan-b",
        }
    }
}

/// Three namespaces and the wires between them.
pub struct Network {
    a: NetNs,
    b: NetNs,
    client: NetNs,
}

impl Network {
    /// Builds namespaces and wires.
    pub fn new() -> Result<Self> {
        tools::require("ip")?;
        let network = Self { a: NetNs::new("a")?, b: NetNs::new("b")?, client: NetNs::new("client")? };
        network.client.ip("link add lan type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link set lan address 02:77:00:00:00:01\n\
             link add repl type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             addr add 10.77.0.1/24 dev lan\n\
             link set lan up\n\
             link set repl up\n")?;
        for node in Node::BOTH {
            network.connect(node)?;
        }
        Ok(network)
    }

    fn connect(&self, node: Node) -> Result<()> {
        let host = self.host(node);
        let there = host.path().display().to_string();
        self.client.ip(&format!(
            "link add lan-{node} type veth peer name lan0 netns {there}\n\
             link add repl-{node} type veth peer name repl0 netns {there}\n\
             link set lan-{node} master lan up\n\
             link set repl-{node} master repl up\n"
        ))?;
        let address = replication_ip(node);
        host.ip(&format!(
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             tuntap add dev {TAP} mode tap\n\
             link set {TAP} master br0 up\n\
             link set lan0 master br0 up\n\
             link set br0 up\n\
             addr add {address}/24 dev repl0\n\
             link set repl0 up\n"
        ))
    }

    /// One host's namespace.
    #[must_use]
    pub fn host(&self, node: Node) -> &NetNs {
        match node {
            Node::A => &self.a,
            Node::B => &self.b,
        }
    }

    /// The client's namespace.
    #[must_use]
    pub fn client(&self) -> &NetNs {
        &self.client
    }

    /// Plugs one more client into the guest LAN, in a namespace of its own, with an address that ends in `number`.
    pub fn add_client(&self, number: u8) -> Result<NetNs> {
        let client = NetNs::new(&format!("client-{number}"))?;
        let there = client.path().display().to_string();
        self.client.ip(&format!(
            "link add lan-c{number} type veth peer name lan0 netns {there}\n\
             link set lan-c{number} master lan up\n"
        ))?;
        client.ip(&format!("addr add 10.77.0.{number}/24 dev lan0\nlink set lan0 up\n"))?;
        Ok(client)
    }

    /// Cuts wires, all at once.
    pub fn cut(&self, wires: &[Wire]) -> Result<()> {
        self.set(wires, "down")
    }

    /// Mends wires.
    pub fn mend(&self, wires: &[Wire]) -> Result<()> {
        self.set(wires, "up")
    }

    fn set(&self, wires: &[Wire], state: &str) -> Result<()> {
        let batch: String = wires.iter().map(|wire| format!("link set {} {state}\n", wire.port())).collect();
        self.client.ip(&batch)
    }
}

/// A host's address on the replication link.
#[must_use]
pub fn replication_ip(node: Node) -> &'static str {
    match node {
        Node::A => "10.78.0.1",
        Node::B => "10.78.0.2",
    }
}
