//! The kernel command line: `ip=10.77.0.10/24 gw=10.77.0.1 port=6379 virtio_mmio.device=512@0xfeb00e00:12`.
//! Words that are not known are ignored, as kernels do.

use crate::database::AppendFsync;

/// Most virtio-mmio devices that are looked at.
pub const MAX_DEVICES: usize = 16;

/// A virtio-mmio device, as `virtio_mmio.device=<size>@<address>:<irq>` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Physical address of its registers.
    pub address: u64,
    /// Length of its registers in bytes.
    pub size: u64,
    /// Its global interrupt number, an input of the I/O APIC.
    pub irq: u32,
}

/// What the command line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The guest's IPv4 address.
    pub address: [u8; 4],
    /// Length of its network prefix in bits.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: Option<[u8; 4]>,
    /// TCP port of the server.
    pub port: u16,
    /// Largest heap in bytes; `None` takes what the memory map gives.
    pub heap: Option<u64>,
    /// Seconds between two lines of counters on the console.
    pub counters: Option<u32>,
    /// Whether disks are used; `None`: if there are any.
    pub disk: Option<bool>,
    /// When changes are flushed to the log.
    pub appendfsync: AppendFsync,
    devices: [Option<MmioDevice>; MAX_DEVICES],
}

impl Options {
    /// The virtio-mmio devices in the order of the command line.
    pub fn devices(&self) -> impl Iterator<Item = MmioDevice> {
        self.devices.iter().flatten().copied()
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: [10, 77, 0, 10],
            prefix: 24,
            gateway: None,
            port: 6379,
            heap: None,
            counters: None,
            disk: None,
            appendfsync: AppendFsync::EverySecond,
            devices: [None; MAX_DEVICES],
        }
    }
}

/// A word of the command line whose value makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadWord<'a>(pub &'a str);

/// Parses a command line.
///
/// # Errors
/// The first word that is known but cannot be understood, or a device beyond [`MAX_DEVICES`].
pub fn parse(line: &str) -> Result<Options, BadWord<'_>> {
    let mut options = Options::default();
    let mut devices = 0;
    for word in line.split_ascii_whitespace() {
        let Some((key, value)) = word.split_once('=') else { continue };
        let bad = BadWord(word);
        match key {
            "ip" => {
                let (address, prefix) = value.split_once('/').ok_or(bad)?;
                options.address = ipv4(address).ok_or(bad)?;
                let number = core::net::Ipv4Addr::from(options.address);
                if number.is_unspecified() || number.is_multicast() || number.is_broadcast() {
                    return Err(bad);
                }
                options.prefix = prefix.parse().ok().filter(|bits| *bits <= 32).ok_or(bad)?;
            }
            "gw" => options.gateway = Some(ipv4(value).ok_or(bad)?),
            "port" => options.port = value.parse().ok().filter(|port| *port != 0).ok_or(bad)?,
            "heap" => options.heap = Some(size(value).ok_or(bad)?),
            "counters" => options.counters = Some(value.parse().ok().filter(|seconds| *seconds != 0).ok_or(bad)?),
            "disk" => {
                options.disk = Some(match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad),
                });
            }
            "appendfsync" => {
                let policies = [AppendFsync::Always, AppendFsync::EverySecond, AppendFsync::Never];
                options.appendfsync = policies.into_iter().find(|policy| policy.name() == value).ok_or(bad)?;
            }
            "virtio_mmio.device" => {
                *options.devices.get_mut(devices).ok_or(bad)? = Some(device(value).ok_or(bad)?);
                devices += 1;
            }
            _ => {}
        }
    }
    Ok(options)
}

fn ipv4(text: &str) -> Option<[u8; 4]> {
    text.parse::<core::net::Ipv4Addr>().ok().map(|address| address.octets())
}

/// `<size>@<address>:<irq>[:<id>]`
fn device(text: &str) -> Option<MmioDevice> {
    let (length, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    let (address, irq) = (number(parts.next()?)?, number(parts.next()?)?);
    let _id = parts.next();
    if parts.next().is_some() || address % 4 != 0 {
        return None;
    }
    let size = size(length)?;
    address.checked_add(size)?;
    Some(MmioDevice { address, size, irq: u32::try_from(irq).ok()? })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A number of bytes with an optional suffix: `4K`, `16MiB`, `1G`.
pub(crate) fn size(text: &str) -> Option<u64> {
    let bare = text.strip_suffix("iB").unwrap_or(text);
    // `0x20c` ends in no unit, so that only K, M and G, which are no digits, are looked for.
    let shift = match bare.bytes().last()? {
        b'K' | b'k' => 10,
        b'M' | b'm' => 20,
        b'G' | b'g' => 30,
        _ if bare.len() == text.len() => return number(text),
        _ => return None,
    };
    let value = number(bare.get(..bare.len() - 1)?)?;
    value.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line() {
        let line = "console=ttyS0 quiet ip=10.0.0.2/16 gw=10.0.0.1 port=7000 heap=48MiB counters=5 disk=off appendfsync=always \
                    virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=4K@0xd0000000:5:1";
        let options = parse(line).unwrap();
        assert_eq!((options.address, options.prefix), ([10, 0, 0, 2], 16));
        assert_eq!((options.gateway, options.port), (Some([10, 0, 0, 1]), 7000));
        assert_eq!((options.heap, options.counters), (Some(48 << 20), Some(5)));
        assert_eq!((options.disk, options.appendfsync), (Some(false), AppendFsync::Always));
        let devices: Vec<_> = options.devices().collect();
        assert_eq!(devices[0], MmioDevice { address: 0xfeb0_0e00, size: 512, irq: 12 });
        assert_eq!(devices[1], MmioDevice { address: 0xd000_0000, size: 4096, irq: 5 });
    }

    #[test]
    fn defaults() {
        assert_eq!(parse("").unwrap(), Options::default());
        assert_eq!(parse("ro root=/dev/vda").unwrap(), Options::default());
    }

    #[test]
    fn bad_words_are_named() {
        for word in [
            "ip=10.0.0.2",
            "ip=10.0.0/24",
            "ip=10.0.0.2/33",
            "ip=0.0.0.0/0",
            "ip=224.0.0.1/24",
            "ip=255.255.255.255/24",
            "gw=x",
            "port=0",
            "port=65536",
            "heap=iB",
            "heap=1T",
            "heap=17179869184G",
            "counters=0",
            "disk=maybe",
            "appendfsync=sometimes",
            "virtio_mmio.device=512",
            "virtio_mmio.device=512@0x1:5",
            "virtio_mmio.device=512@0xfffffffffffffffc:5",
            "virtio_mmio.device=512@0x10:4294967296",
        ] {
            assert_eq!(parse(word), Err(BadWord(word)));
        }
        let many = "virtio_mmio.device=512@0x1000:5 ".repeat(MAX_DEVICES + 1);
        assert!(parse(&many).is_err());
    }
}
