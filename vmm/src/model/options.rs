//! What the program is told at boot.

/// Most pages a second that the dirtying load can be asked for.
pub(super) const MAX_RATE: u64 = 10_000_000;
/// Longest interval of the beacon in milliseconds: an hour.
const MAX_BEACON_MS: u64 = 3_600_000;

/// What the program is told at boot; the command line says it in the words of the demo guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramOptions {
    /// `seed=`: start of the program's random numbers.
    pub seed: u64,
    /// `ip=A.B.C.D/BITS`: the program's IPv4 address.
    pub ip: [u8; 4],
    /// The prefix length of `ip=` in bits.
    pub prefix: u8,
    /// `port=`: TCP port of the server.
    pub port: u16,
    /// `dirty=RATE[,PAGES]`: pages a second that the background load writes to; 0 is none.
    pub dirty_pages_per_second: u64,
    /// Over how many pages it goes round; all that there are for it if not said.
    pub working_set_pages: Option<u64>,
    /// `beacon=MS`: milliseconds between two UDP broadcasts; 0 is none.
    pub beacon_ms: u64,
    /// `disklog=0|1`: changes of the data set are logged on disk 0, and read from there at boot.
    pub disk_log: bool,
    /// `appendfsync=always|no`: a change is on stable storage before it is answered.
    pub append_fsync_always: bool,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            ip: [10, 77, 0, 10],
            prefix: 24,
            port: 6379,
            dirty_pages_per_second: 0,
            working_set_pages: None,
            beacon_ms: 0,
            disk_log: false,
            append_fsync_always: false,
        }
    }
}

/// A word of the command line whose value makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the command line word {word:?} is wrong: {wanted}")]
pub struct BadWord {
    /// The word.
    pub word: String,
    /// What would be right.
    pub wanted: &'static str,
}

impl ProgramOptions {
    /// Reads a kernel command line. Words that are not known are ignored, as kernels do.
    pub fn parse(cmdline: &str) -> Result<Self, BadWord> {
        let mut options = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            if let Some((key, value)) = word.split_once('=') {
                options.set(key, value).map_err(|wanted| BadWord { word: word.into(), wanted })?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "ip" => {
                let wanted = "ip=10.77.0.10/24 is an example";
                let (address, prefix) = value.split_once('/').ok_or(wanted)?;
                self.ip = address.parse::<std::net::Ipv4Addr>().map_err(|_| wanted)?.octets();
                self.prefix = prefix.parse().ok().filter(|bits| *bits <= 32).ok_or(wanted)?;
            }
            "port" => self.port = value.parse().ok().filter(|p| *p != 0).ok_or("a port is 1 to 65535")?,
            "seed" => self.seed = value.parse().map_err(|_| "a seed is a whole number")?,
            "dirty" => {
                let wanted =
                    "dirty=PAGES_PER_SECOND[,WORKING_SET_PAGES], whole numbers, at most 10000000 pages a second";
                let (rate, pages) = match value.split_once(',') {
                    Some((rate, pages)) => (rate, Some(pages)),
                    None => (value, None),
                };
                self.dirty_pages_per_second = rate.parse().ok().filter(|r| *r <= MAX_RATE).ok_or(wanted)?;
                self.working_set_pages = match pages {
                    Some(pages) => Some(pages.parse().ok().filter(|p| *p > 0).ok_or(wanted)?),
                    None => None,
                };
            }
            "beacon" => {
                let wanted = "beacon=MILLISECONDS, 0 to 3600000";
                self.beacon_ms = value.parse().ok().filter(|ms| *ms <= MAX_BEACON_MS).ok_or(wanted)?;
            }
            "disklog" => {
                self.disk_log = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err("disklog=0 or disklog=1"),
                };
            }
            "appendfsync" => {
                self.append_fsync_always = match value {
                    "always" => true,
                    "no" => false,
                    _ => return Err("appendfsync=always or appendfsync=no"),
                };
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line() {
        let line =
            "quiet ip=10.0.0.2/16 gw=10.0.0.1 port=7000 dirty=1000,256 seed=7 beacon=50 disklog=1 appendfsync=always";
        let wanted = ProgramOptions {
            seed: 7,
            ip: [10, 0, 0, 2],
            prefix: 16,
            port: 7000,
            dirty_pages_per_second: 1000,
            working_set_pages: Some(256),
            beacon_ms: 50,
            disk_log: true,
            append_fsync_always: true,
        };
        assert_eq!(ProgramOptions::parse(line), Ok(wanted));
        assert_eq!(ProgramOptions::parse(""), Ok(ProgramOptions::default()));
    }

    #[test]
    fn bad_words_are_named() {
        for word in ["ip=10.0.0.2", "ip=10.0.0/24", "ip=1.2.3.4/33", "port=0", "port=65536", "seed=x", "seed=-1"] {
            assert_eq!(ProgramOptions::parse(word).unwrap_err().word, word);
        }
        for word in [
            "dirty=",
            "dirty=1,0",
            "dirty=1,",
            "dirty=99999999999",
            "beacon=x",
            "beacon=3600001",
            "disklog=yes",
            "appendfsync=1",
        ] {
            assert_eq!(ProgramOptions::parse(word).unwrap_err().word, word);
        }
    }
}
