//! ftctl as a person or a script meets it: exit codes, one-line errors, data on standard output.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use assert_cmd::Command;
use crossbeam::channel::bounded;
use failover::arbiter::{Arbiter, FileArbiter, contract};
use failover::config::PairConfig;
use failover::control::ControlServer;
use failover::decide::{Command as CoreCommand, CommandOutcome};
use failover::status::{Labels, NodeRole, Status, StatusBoard};
use replication_proto::Incarnation;

struct Scene {
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().expect("a directory") };
        let text = r#"
            [vm]
            name = "web1"
            id = "6f3c0000-1111-4222-8333-444455556666"
            memory = "64MiB"
            machine = "model"
            [arbiter]
            kind = "file"
            path = "record.json"
            [nodes.a]
            replication = "127.0.0.1:7400"
            tap = "ftap0"
            control = "a.sock"
            state_dir = "a"
            [nodes.b]
            replication = "127.0.0.1:7401"
            tap = "ftap1"
            control = "b.sock"
            state_dir = "b"
        "#;
        fs::write(scene.config(), text).expect("written");
        scene
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("pair.toml")
    }

    fn board(&self) -> StatusBoard {
        let config = PairConfig::load(&self.config()).expect("a good file");
        let me = config.pick("a").expect("a node");
        StatusBoard::new(&Labels::new(&config, &me, Incarnation(5)), NodeRole::Primary)
    }

    fn ftctl(&self, words: &[&str]) -> (i32, String, String) {
        let output = Command::cargo_bin("ftctl")
            .expect("built")
            .arg("--config")
            .arg(self.config())
            .args(["--node", "a"])
            .args(words)
            .timeout(Duration::from_secs(30))
            .output()
            .expect("ended in time");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (output.status.code().expect("an exit code"), text(output.stdout), text(output.stderr))
    }
}

#[test]
fn nobody_there_wrong_words_and_wrong_files() {
    let scene = Scene::new();
    let (code, out, err) = scene.ftctl(&["status"]);
    assert_eq!((code, out.as_str(), err.lines().count()), (3, "", 1), "{err}");
    assert!(err.contains("is the process running?"));
    let (code, _, err) = scene.ftctl(&["status", "--wait", "protected", "--timeout", "50ms"]);
    assert!(code == 124 && err.contains("not protected in time"), "{err}");
    assert_eq!(scene.ftctl(&["status", "--wait", "happy"]).0, 64);
    assert_eq!(scene.ftctl(&["status", "--wait", "solo", "--timeout", "5"]).0, 64);
    assert_eq!(scene.ftctl(&["reboot"]).0, 64);
    assert_eq!(scene.ftctl(&["failover", "--force", "--yes"]).0, 64, "--confirm is needed");
    assert_eq!(scene.ftctl(&["--help"]).0, 0);
    assert_eq!(scene.ftctl(&["failover", "--yes"]).0, 3);
    fs::write(scene.config(), "[vm]\nname = 3").unwrap();
    let (code, _, err) = scene.ftctl(&["status"]);
    assert!(code == 78 && err.lines().count() == 1 && err.contains("line 2"), "{err}");
}

#[test]
fn config_check_prints_what_it_reads_back() {
    let scene = Scene::new();
    let (code, out, _) = scene.ftctl(&["config", "check"]);
    assert_eq!(code, 0);
    assert!(out.contains("takeover = \"300ms\"") && out.contains("# link cut: the primary has 150ms"), "{out}");
    fs::write(scene.config(), out).unwrap();
    assert_eq!(scene.ftctl(&["config", "check"]).0, 0);
}

#[test]
fn arbiter_show_without_any_process() {
    let scene = Scene::new();
    let (code, out, err) = scene.ftctl(&["arbiter", "show"]);
    assert!(code == 2 && out.contains("none yet") && err.contains("no record yet"), "{out}{err}");
    let record = scene.directory.path().join("record.json");
    FileArbiter::open(&record).unwrap().compare_and_swap(None, &contract::sample(3));
    let (code, out, _) = scene.ftctl(&["arbiter", "show"]);
    assert!(code == 78 && out.contains("generation  3\n") && out.contains("owner       a/"), "{out}");
    let (_, out, _) = scene.ftctl(&["arbiter", "show", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&value["schema"], &value["revision"]), (&"ft.arbiter/1".into(), &1.into()));
    assert_eq!(value["record"]["note"], "sample 3");
    fs::write(scene.directory.path().join("record.json"), "garbage").unwrap();
    let (code, _, err) = scene.ftctl(&["arbiter", "show"]);
    assert!(code == 3 && err.contains("not usable"), "{err}");
}

#[test]
fn status_and_commands_of_a_process() {
    let scene = Scene::new();
    let board = scene.board();
    let (sender, commands) = bounded(4);
    let socket = scene.directory.path().join("a.sock");
    let _server = ControlServer::start(&socket, "web1", board.clone(), sender, || {}).unwrap();

    let (code, out, _) = scene.ftctl(&["status"]);
    assert!(code == 2 && out.starts_with("VM web1 (6f3c0000…)  DOWN"), "{code} {out}");
    assert!(out.contains("NOT a KVM guest"), "{out}");
    let (_, out, _) = scene.ftctl(&["status", "--output", "json"]);
    assert_eq!(serde_json::from_str::<Status>(&out).unwrap().schema, "ft.status/1");
    assert!(scene.ftctl(&["status", "--output", "prom"]).1.contains("ft_protected 0\n"));
    board.update(|status| {
        (status.protected, status.armed) = (true, true);
    });
    assert_eq!(scene.ftctl(&["status"]).0, 0);
    assert_eq!(scene.ftctl(&["status", "--wait", "armed"]).0, 0);

    assert_eq!(scene.ftctl(&["failover"]).0, 4, "not a terminal, no --yes");
    assert_eq!(scene.ftctl(&["failover", "--force", "--confirm", "web2", "--yes"]).0, 4);
    assert!(commands.is_empty());
    let answers = [
        CommandOutcome::Done("b runs".into()),
        CommandOutcome::Refused("not protected".into()),
        CommandOutcome::Unknown("lost".into()),
    ];
    let core = std::thread::spawn(move || {
        for answer in answers {
            let request = commands.recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(request.command, CoreCommand::Switchover);
            request.reply.progress("draining");
            request.reply.finish(answer, None);
        }
        let request = commands.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(request.command, CoreCommand::Stop);
        // Dies without an answer.
        drop(request);
    });
    let (code, out, _) = scene.ftctl(&["failover", "--yes"]);
    assert!(code == 0 && out.contains("draining") && out.contains("b runs"), "{out}");
    assert_eq!(scene.ftctl(&["failover", "--yes"]).0, 4);
    assert_eq!(scene.ftctl(&["failover", "--yes"]).0, 5);
    assert_eq!(scene.ftctl(&["stop", "--yes"]).0, 5);
    core.join().unwrap();
    board.update(|status| status.role = NodeRole::Backup);
    let (code, _, err) = scene.ftctl(&["drill", "--yes"]);
    assert!(code == 4 && err.contains("ask b, which runs the guest"), "{err}");
    assert_eq!(scene.ftctl(&["pause-protection", "--for", "500ms", "--yes"]).0, 4);
    assert_eq!(scene.ftctl(&["pause-protection", "--for", "169h", "--yes"]).0, 4);
}
