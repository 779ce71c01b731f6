use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn section(extra: &str) -> EtcdSection {
    toml::from_str(&format!("endpoints = [\"http://127.0.0.1:1\", \"http://127.0.0.1:2\"]\n{extra}")).unwrap()
}

#[test]
fn nobody_there_is_unreachable_and_a_swap_certainly_not_done() {
    let mut arbiter = EtcdArbiter::open(&section(""), VmId(7)).unwrap();
    assert!(arbiter.describe().starts_with("etcd http://127.0.0.1:1 (+1) /ft/00000000-"), "{}", arbiter.describe());
    let Err(ArbiterError::Unreachable(text)) = arbiter.read() else { panic!() };
    assert!(text.contains(":1: ") && text.contains(":2: ") && text.contains("refused"), "{text}");
    let outcome = arbiter.compare_and_swap(None, &super::super::contract::sample(1));
    assert!(matches!(outcome, CasOutcome::Failed(_)), "{outcome:?}");
}

#[test]
fn secrets_that_others_may_read_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let open = || {
        let extra = format!("user = \"ft\"\npassword_file = {:?}", path.display().to_string());
        EtcdArbiter::open(&section(&extra), VmId(7)).map(drop).map_err(|error| error.to_string())
    };
    assert!(open().unwrap_err().contains("No such file"));
    for (content, mode, expected) in [
        ("secret\n", 0o644, "chmod 600"),
        ("secret\n", 0o620, "chmod 600"),
        ("", 0o600, "on one line"),
        ("\n", 0o600, "on one line"),
        ("two\nlines\n", 0o600, "on one line"),
    ] {
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let error = open().unwrap_err();
        assert!(error.contains(expected) && !error.contains("secret"), "{error}");
    }
    fs::write(&path, "s3cret\r\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    open().unwrap();
    assert_eq!(secrets::password(&path).unwrap(), "s3cret");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(open().unwrap_err().contains("not a regular file"));
}

#[test]
fn what_is_no_certificate_is_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.pem");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for content in ["", "hello", broken, "-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n"] {
        fs::write(&path, content).unwrap();
        let section: EtcdSection =
            toml::from_str(&format!("endpoints = [\"https://127.0.0.1:1\"]\nca = {:?}", path.display().to_string()))
                .unwrap();
        let Err(ArbiterError::Unusable(text)) = EtcdArbiter::open(&section, VmId(7)).map(drop) else {
            panic!("{content}")
        };
        assert!(text.contains("ca.pem") && text.lines().count() == 1, "{text}");
    }
}
