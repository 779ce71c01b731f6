use super::*;

const GOOD: &str = r#"
[vm]
name = "web1"
id = "6f3c0000-1111-4222-8333-444455556666"
memory = "256MiB"
kernel = "guest-kv"

[arbiter]
kind = "file"
path = "record.json"

[nodes.a]
replication = "127.0.0.1:7400"
tap = "ftap0"
control = "/run/ft/a.sock"
health = "127.0.0.1:7480"
state_dir = "/var/lib/ft/a"

[nodes.b]
replication = "127.0.0.1:7401"
tap = "ftap1"
control = "/run/ft/b.sock"
state_dir = "/var/lib/ft/b"
"#;

fn parse(text: &str) -> Result<PairConfig, ConfigError> {
    PairConfig::parse(text, "pair.toml", Path::new("/etc/ft"))
}

fn message(text: &str) -> String {
    let text = parse(text).unwrap_err().to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn edited(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replacen(from, to, 1)
}

#[test]
fn defaults_paths_and_sides() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.timers.solo, Duration::from_millis(150));
    assert_eq!(config.limits.staging, 128 << 20);
    assert_eq!(config.vm.kernel.as_deref(), Some(Path::new("/etc/ft/guest-kv")));
    let a = config.pick("a").unwrap();
    assert_eq!(config.peer_of(&a).unwrap().0.as_str(), "b");
    assert_eq!(config.node(&a).unwrap().console(), Console::File("/var/lib/ft/a/console.log".into()));
    assert!(config.pick("c\u{1b}[2J").unwrap_err().to_string().contains("the configuration has a and b"));
    assert_eq!(config.vm.mac().to_string()[..9], *"52:54:00:");
    assert_eq!(config.vm.mac(), parse(GOOD).unwrap().vm.mac());
}

#[test]
fn the_effective_configuration_reads_as_itself() {
    let config = parse(GOOD).unwrap();
    assert_eq!(parse(&config.effective()), Ok(config.clone()));
    assert!(config.derived().contains("primary killed: takeover begins after about 20ms"));
}

#[test]
fn an_overload_has_a_policy_and_shows_it() {
    let cases = [
        ("", Overload::Lengthen, "overload: epochs get longer"),
        ("overload = \"throttle\"\n", Overload::Throttle, "processors are slowed"),
        ("overload = \"drop\"\noverload_patience = \"7s\"\n", Overload::Drop, "after 7s of it protection ends"),
    ];
    for (lines, policy, told) in cases {
        let config = parse(&format!("{GOOD}[epoch]\n{lines}")).unwrap();
        assert_eq!(config.epoch.overload, policy);
        assert!(config.derived().contains(told), "{}", config.derived());
        assert!(config.effective().contains(&format!("overload = \"{}\"", policy.word())), "{}", config.effective());
        assert_eq!(parse(&config.effective()), Ok(config.clone()), "{}", config.effective());
    }
}

#[test]
fn an_epoch_has_one_target_and_shows_it() {
    let pace = |lines: &str| parse(&format!("{GOOD}[epoch]\n{lines}")).map(|config| (config.epoch.pace, config));
    let ms = Duration::from_millis;
    let cases = [
        ("", EpochPace::Latency(ms(2)), "at most 2ms"),
        ("latency = \"5ms\"\n", EpochPace::Latency(ms(5)), "at most 5ms"),
        ("interval = \"25ms\"\n", EpochPace::Fixed(ms(25)), "one every 25ms"),
        ("overhead = \"10%\"\n", EpochPace::Overhead(Percent(10)), "at most 10% of the guest's time"),
    ];
    for (lines, expected, told) in cases {
        let (pace, config) = pace(lines).unwrap();
        assert_eq!(pace, expected);
        assert!(config.derived().contains(told), "{}", config.derived());
        assert_eq!(parse(&config.effective()), Ok(config.clone()), "{}", config.effective());
    }
}

#[test]
fn a_capture_strategy_is_one_of_four_and_shown() {
    let epoch = |lines: &str| parse(&format!("{GOOD}[epoch]\n{lines}")).map(|config| (config.epoch, config));
    let cases = [
        ("", CaptureStrategy::Postponed, Precopy::Auto, "pages: copied in the pause, sent while"),
        (
            "capture = \"stop-and-copy\"\nprecopy = \"never\"\n",
            CaptureStrategy::StopAndCopy,
            Precopy::Never,
            "has acknowledged the epoch; never before the pause",
        ),
        ("capture = \"copy-on-write\"\n", CaptureStrategy::CopyOnWrite, Precopy::Auto, "needs userfaultfd"),
        ("capture = \"auto\"\nprecopy = \"always\"\n", CaptureStrategy::Auto, Precopy::Always, "before each pause"),
    ];
    for (lines, capture, precopy, told) in cases {
        let (epoch, config) = epoch(lines).unwrap();
        assert_eq!((epoch.capture, epoch.precopy), (capture, precopy));
        assert!(config.derived().contains(told), "{}", config.derived());
        assert_eq!(parse(&config.effective()), Ok(config.clone()), "{}", config.effective());
        assert!(config.effective().contains(&format!("capture = \"{}\"", capture.word())), "{}", config.effective());
        assert!(config.effective().contains(&format!("precopy = \"{}\"", precopy.word())), "{}", config.effective());
    }
    assert!(message(&format!("{GOOD}[epoch]\ncapture = \"remus\"\n")).contains("unknown variant `remus`"));
}

#[test]
fn a_byte_order_mark_and_dos_lines_are_tolerated_other_encodings_are_not() {
    assert_eq!(parse(&format!("\u{FEFF}{}", GOOD.replace('\n', "\r\n"))), parse(GOOD));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pair.toml");
    let utf16: Vec<u8> = [0xFF, 0xFE].into_iter().chain(GOOD.bytes().flat_map(|byte| [byte, 0])).collect();
    std::fs::write(&path, utf16).unwrap();
    assert!(PairConfig::load(&path).unwrap_err().to_string().contains("UTF-16"));
    std::fs::write(&path, [b'#', 0xC3, 0x28]).unwrap();
    assert!(PairConfig::load(&path).unwrap_err().to_string().contains("not UTF-8"));
}

#[test]
fn a_huge_file_is_refused_without_reading_it_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pair.toml");
    File::create(&path).unwrap().set_len(100 << 20).unwrap();
    assert!(PairConfig::load(&path).unwrap_err().to_string().contains("longer than 1MiB"));
    let missing = PairConfig::load(&directory.path().join("none.toml")).unwrap_err().to_string();
    assert!(missing.contains("none.toml: No such file"), "{missing}");
}

#[test]
fn syntax_errors_name_the_line_and_its_text() {
    let text = message(&edited("memory = \"256MiB\"", "memory = \"256MB\""));
    assert!(text.starts_with("pair.toml line 5: not a size: \"256MB\"") && text.contains("memory ="), "{text}");
    let text = message(&edited("kernel = \"guest-kv\"", "kernal = \"guest-kv\""));
    assert!(text.contains("line 6: unknown field `kernal`"), "{text}");
    let text = message(&format!("{GOOD}\n[timers]\nsolo = \"-5ms\"\n"));
    assert!(text.contains("not a duration") && text.contains("solo ="), "{text}");
    let text = message(&edited("path = \"record.json\"", "path = \"record.json\"\nttl = 3"));
    assert!(text.contains("unknown field `ttl`"), "{text}");
    assert!(message("[vm").contains("line 1"), "unclosed");
    assert!(message(&format!("{GOOD}\n[timers]\nsolo = 150\n")).contains("solo = 150"));
}

#[test]
fn values_out_of_bounds_and_unsafe_timers_are_refused_with_their_key() {
    let cases = [
        (format!("{GOOD}[timers]\ntakeover = \"150ms\"\n"), "timers.takeover: 150ms must be longer than timers.solo"),
        (format!("{GOOD}[timers]\nheartbeat = \"50ms\"\n"), "timers.heartbeat: 50ms is too long"),
        (format!("{GOOD}[epoch]\ninterval = \"0ms\"\n"), "epoch.interval: 0us is out of bounds"),
        (format!("{GOOD}[epoch]\nlatency = \"100us\"\n"), "epoch.latency: 100us is out of bounds"),
        (format!("{GOOD}[epoch]\noverhead = \"95%\"\n"), "epoch.overhead: 95% leaves the guest nothing"),
        (format!("{GOOD}[epoch]\noverload = \"panic\"\n"), "unknown variant"),
        (format!("{GOOD}[epoch]\noverload_patience = \"5ms\"\n"), "epoch.overload_patience: 5ms is out of bounds"),
        (format!("{GOOD}[epoch]\nin_flight = 9\n"), "epoch.in_flight: 9 is out of bounds"),
        (format!("{GOOD}[epoch]\nlatency = \"2ms\"\ninterval = \"25ms\"\n"), "say one of them"),
        (format!("{GOOD}[limits]\nstaging = \"1B\"\n"), "limits.staging"),
        (edited("memory = \"256MiB\"", "memory = \"1048577B\""), "vm.memory: must be a multiple"),
        (edited("kernel = \"guest-kv\"", "vcpus = 3"), "vm.vcpus: 3 vCPUs"),
        (edited("kernel = \"guest-kv\"", "vcpus = 1"), "vm.kernel: missing"),
        (edited("127.0.0.1:7401", "127.0.0.1:7400"), "nodes.b.replication: the same as that of node a"),
        (edited("127.0.0.1:7401", "10.78.0.2:7400"), "nodes.b.replication: 10.78.0.2:7400 is not loopback"),
        (edited("127.0.0.1:7401", "0.0.0.0:7400"), "nodes.b.replication: must be the address"),
        (edited("/run/ft/b.sock", "/run/ft/a.sock"), "nodes.b.control"),
        (edited("/var/lib/ft/b", "/var/lib/ft/a"), "nodes.b.state_dir"),
        (edited("ftap1", "../evil"), "nodes.b.tap"),
        (edited("/run/ft/b.sock", &format!("/run/{}", "x".repeat(120))), "nodes.b.control: 125 bytes"),
        (
            edited(
                "[nodes.b]",
                "[nodes.a2]\nreplication = \"127.0.0.1:1\"\ntap=\"t\"\ncontrol=\"c\"\nstate_dir=\"s\"\n[nodes.b]",
            ),
            "nodes: 3 nodes",
        ),
    ];
    for (text, expected) in cases {
        let found = message(&text);
        assert!(found.contains(expected), "{found}\n  lacks {expected}");
    }
    assert!(parse(&format!("{}[link]\ninsecure_lab = true\n", edited("127.0.0.1:7401", "10.78.0.2:7400"))).is_ok());
}

#[test]
fn names_and_addresses_are_checked_where_they_are_read() {
    for (from, to) in [
        ("name = \"web1\"", "name = \"../x\""),
        ("name = \"web1\"", "name = \"a\\u001b[2J\""),
        ("6f3c0000-1111-4222-8333-444455556666", "6f3c"),
        ("kernel = \"guest-kv\"", "kernel = \"k\"\nmac = \"ff:ff:ff:ff:ff:ff\""),
        ("kernel = \"guest-kv\"", "kernel = \"k\"\nmac = \"52:54:00:1:2:3\""),
        ("[nodes.a]", "[nodes.A]"),
        ("tap = \"ftap0\"", "tap = \"ftap0\"\nconsole = \"unix:\""),
    ] {
        message(&edited(from, to));
    }
    assert!(parse(&edited("tap = \"ftap0\"", "tap = \"ftap0\"\nconsole = \"unix:/run/c\"")).is_ok());
}

/// The pair's file with etcd in place of the file, and `lines` added to its table.
fn etcd(lines: &str) -> String {
    edited("kind = \"file\"\npath = \"record.json\"", &format!("kind = \"etcd\"\n{lines}"))
}

const LOOPBACK: &str = "endpoints = [\"http://127.0.0.1:2379\"]\n";
const SECURE: &str = "endpoints = [\"https://10.0.0.1:2379\", \"https://etcd-2.lan:2379\"]\nca = \"ca.pem\"\n";

#[test]
fn etcd_has_defaults_and_paths_of_its_own() {
    let config = parse(&etcd(LOOPBACK)).unwrap();
    let ArbiterSection::Etcd(section) = &config.arbiter else { panic!() };
    assert_eq!((section.prefix.as_str(), section.timeout), ("/ft/", Duration::from_secs(1)));
    assert!(config.derived().contains("arbiter: etcd, one endpoint"));
    assert_eq!(parse(&config.effective()), Ok(config.clone()));
    let all = format!(
        "{SECURE}cert = \"c.pem\"\nkey = \"/k.pem\"\nuser = \"ft\"\npassword_file = \"pw\"\ntimeout = \"2s\"\n\
         connect_timeout = \"100ms\"\nprefix = \"/lab/\"\ncluster_id = \"cdf818194e3a8c32\"\n"
    );
    let config = parse(&etcd(&all)).unwrap();
    let ArbiterSection::Etcd(section) = &config.arbiter else { panic!() };
    assert_eq!(section.cert.as_deref(), Some(Path::new("/etc/ft/c.pem")));
    assert_eq!(section.key.as_deref(), Some(Path::new("/k.pem")));
    assert_eq!(section.cluster(), Some(0xcdf8_1819_4e3a_8c32));
    assert!(config.derived().contains("TLS, both sides show certificates"));
    assert_eq!(parse(&config.effective()), Ok(config.clone()));
}

#[test]
fn etcd_settings_that_are_wrong_or_unsafe_are_refused() {
    let cases = [
        ("endpoints = []", "arbiter.endpoints: 0 endpoints"),
        ("endpoints = [\"127.0.0.1:2379\"]", "arbiter.endpoints: \"127.0.0.1:2379\" is none"),
        ("endpoints = [\"http://127.0.0.1\"]", "is none"),
        ("endpoints = [\"http://127.0.0.1:2379/v3\"]", "is none"),
        ("endpoints = [\"http://me:secret@127.0.0.1:2379\"]", "is none"),
        ("endpoints = [\"ftp://127.0.0.1:2379\"]", "is none"),
        ("endpoints = [\"http://10.0.0.1:2379\"]", "neither https:// nor loopback"),
        ("endpoints = [\"http://[::1]:1\", \"http://[::1]:1\"]", "is there twice"),
        ("endpoints = [\"https://a:1\", \"http://[::1]:1\"]\nca = \"c\"", "all or none"),
        ("endpoints = [\"https://10.0.0.1:2379\"]", "arbiter.ca: https:// endpoints need it"),
        ("endpoints = [\"http://[::1]:1\"]\nca = \"c\"", "arbiter.ca"),
        ("endpoints = [\"http://[::1]:1\"]\ncert = \"c\"", "arbiter.cert, key: only one"),
        ("endpoints = [\"http://[::1]:1\"]\nuser = \"u\"", "arbiter.user, password_file: only one"),
        ("endpoints = [\"http://[::1]:1\"]\nprefix = \"ft\"", "arbiter.prefix"),
        ("endpoints = [\"http://[::1]:1\"]\ntimeout = \"1m\"", "arbiter.timeout: 1m is out of bounds"),
        ("endpoints = [\"http://[::1]:1\"]\nconnect_timeout = \"2s\"", "arbiter.connect_timeout"),
        ("endpoints = [\"http://[::1]:1\"]\ncluster_id = \"0x12\"", "arbiter.cluster_id"),
        ("endpoints = [\"http://[::1]:1\"]\ncluster_id = \"+12\"", "arbiter.cluster_id"),
        ("endpoints = [\"http://[::1]:1\"]\nlease = \"5s\"", "unknown field `lease`"),
        ("endpoints = [\"http://[::1]:1\"]\npath = \"x\"", "unknown field `path`"),
        ("prefix = \"/ft/\"", "missing field `endpoints`"),
    ];
    for (lines, expected) in cases {
        let found = message(&etcd(lines));
        assert!(found.contains(expected), "{found}\n  lacks {expected}");
    }
    assert!(parse(&etcd("endpoints = [\"http://10.0.0.1:2379\"]\ninsecure_lab = true")).is_ok());
}

/// The two nodes of the README's example are two hosts: what is one path in the file is two files.
#[test]
fn the_readme_s_example_is_a_configuration() {
    let readme = include_str!("../../../README.md");
    let example = readme.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
    let config = PairConfig::parse(example, "README.md", Path::new("/")).unwrap();
    let [a, b] = ["a", "b"].map(|name| config.node(&config.pick(name).unwrap()).unwrap());
    assert_eq!((&a.control, &a.state_dir), (&b.control, &b.state_dir));
}

/// The pair's file with `disks` in front of it, and these `disks = ` lines in its nodes.
fn with_disks(disks: &str, a: &str, b: &str) -> String {
    let text = edited("state_dir = \"/var/lib/ft/a\"", &format!("state_dir = \"/var/lib/ft/a\"\n{a}"));
    let text = text.replacen("state_dir = \"/var/lib/ft/b\"", &format!("state_dir = \"/var/lib/ft/b\"\n{b}"), 1);
    format!("{text}\n{disks}")
}

const DATA: &str = "[[disk]]\nname = \"data\"\n";

#[test]
fn disks_have_defaults_and_a_path_on_each_node() {
    let disks = "[[disk]]\nname = \"root\"\nread_only = true\n[[disk]]\nname = \"data\"\nsize = \"64MiB\"\n";
    let a = "disks = { root = \"r.img\", data = \"/dev/vg/data\" }";
    let config = parse(&with_disks(disks, a, "disks = { data = \"b.img\", root = \"/r.img\" }")).unwrap();
    let shapes: Vec<_> = config.disk.iter().map(|d| (d.name.as_str(), d.size, d.read_only)).collect();
    assert_eq!(shapes, [("root", None, true), ("data", Some(64 << 20), false)]);
    let paths = &config.node(&config.pick("a").unwrap()).unwrap().disks;
    assert_eq!(paths[&config.disk[0].name], Path::new("/etc/ft/r.img"));
    assert_eq!(paths[&config.disk[1].name], Path::new("/dev/vg/data"));
    assert_eq!((config.limits.disk_log, config.limits.journal), (64 << 20, 256 << 20));
    assert!(config.derived().contains("root (as large as its image, read-only"), "{}", config.derived());
    assert_eq!(parse(&config.effective()), Ok(config.clone()));
    assert!(parse(GOOD).unwrap().derived().contains("disks: none"));
}

#[test]
fn disks_that_lack_an_image_or_share_one_are_refused() {
    let both = format!("{DATA}[[disk]]\nname = \"log\"\n");
    let many: String = (0..5).map(|n| format!("[[disk]]\nname = \"d{n}\"\n")).collect();
    let (a, b) = ("disks = { data = \"a.img\" }", "disks = { data = \"b.img\" }");
    let cases = [
        (with_disks(DATA, a, ""), "nodes.b.disks.data: missing: the path"),
        (with_disks("", a, b), "nodes.a.disks.data: there is no [[disk]] of this name"),
        (with_disks(DATA, a, a), "nodes.b.disks.data: an image of node a, too: disks are not shared"),
        (
            with_disks(&both, "disks = { data = \"a\", log = \"l\" }", "disks = { data = \"b\", log = \"a\" }"),
            "nodes.b.disks.log: an image of node a, too",
        ),
        (with_disks(&both, "disks = { data = \"a\", log = \"a\" }", ""), "nodes.a.disks.log: the same image"),
        (with_disks(&format!("{DATA}{DATA}"), a, b), "disk.name: \"data\" is there twice"),
        (with_disks(&many, "", ""), "disk: 5 disks: at most 4"),
        (with_disks(DATA, "disks = { data = \"/\" }", b), "nodes.a.disks.data: names no file"),
        (with_disks(&format!("{DATA}size = \"0B\""), a, b), "disk.data.size: 0B is out of bounds"),
        (with_disks(&format!("{DATA}size = \"1000B\""), a, b), "disk.data.size: must be a multiple"),
        (with_disks(&format!("{DATA}size = \"9999999GiB\""), a, b), "disk.data.size"),
        (with_disks(&format!("{DATA}size = 5"), a, b), "size = 5"),
        (with_disks(&format!("{DATA}sizes = \"1MiB\""), a, b), "unknown field `sizes`"),
        (with_disks("[[disk]]\nname = \"../x\"", "", ""), "not a disk name"),
        (with_disks("[[disk]]\nname = \"twenty-one-characters\"", "", ""), "not a disk name"),
        (format!("{GOOD}[limits]\njournal = \"4KiB\"\n"), "limits.journal"),
        (format!("{GOOD}[limits]\ndisk_log = \"4KiB\"\n"), "limits.disk_log"),
    ];
    for (text, expected) in cases {
        let found = message(&text);
        assert!(found.contains(expected), "{found}\n  lacks {expected}");
    }
    // Two hosts: the same path is two files.
    let two = with_disks(DATA, a, a).replacen("127.0.0.1:7401", "10.78.0.2:7400", 1);
    assert!(parse(&format!("{two}[link]\ninsecure_lab = true\n")).is_ok());
}
