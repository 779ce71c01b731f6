use super::*;
use crate::arbiter::MAX_NOTE_BYTES;
use crate::arbiter::contract::sample;

const KEY: &str = "/ft/x/record";

fn reply(status: u16, body: impl Into<Vec<u8>>) -> HttpReply {
    HttpReply { status, encoding: None, body: body.into() }
}

fn header(revision: u64) -> String {
    format!(
        r#""header":{{"cluster_id":"12297829382473034410","member_id":"7","revision":"{revision}","raft_term":"2"}}"#
    )
}

fn key_value(key: &str, revision: u64, value: &str) -> String {
    let (key, value) = (BASE64.encode(key), BASE64.encode(value));
    format!(r#"{{"key":"{key}","create_revision":"2","mod_revision":"{revision}","version":"1","value":"{value}"}}"#)
}

fn range(store: u64, entry: &str) -> String {
    format!(r#"{{{},"kvs":[{entry}],"count":"1"}}"#, header(store))
}

fn good() -> String {
    range(9, &key_value(KEY, 5, &sample(3).to_json()))
}

fn applied(store: u64) -> String {
    format!(
        r#"{{{},"succeeded":true,"responses":[{{"response_put":{{"header":{{"revision":"{store}"}}}}}}]}}"#,
        header(store)
    )
}

fn conflict(store: u64, stored: &str) -> String {
    format!(
        r#"{{{},"responses":[{{"response_range":{{"header":{{"revision":"9"}},{stored}"count":"1"}}}}]}}"#,
        header(store)
    )
}

fn stored(revision: u64) -> String {
    format!(r#""kvs":[{{"key":"{}","mod_revision":"{revision}"}}],"#, BASE64.encode(KEY))
}

#[test]
fn requests_are_linearizable_and_name_the_revision() {
    let Call { path, body } = Call::range(KEY);
    let body: serde_json::Value = serde_json::from_str(&body.unwrap()).unwrap();
    assert_eq!((path, body.as_object().unwrap().len()), ("/v3/kv/range", 1), "a key and nothing else: {body}");
    let Call { path, body } = Call::swap(KEY, Some(Revision(1 << 60)), &sample(1)).unwrap();
    let body: serde_json::Value = serde_json::from_str(&body.unwrap()).unwrap();
    assert_eq!(path, "/v3/kv/txn");
    // As a number it would be rounded on its way through JSON.
    assert_eq!(body["compare"][0]["mod_revision"], "1152921504606846976");
    assert_eq!((&body["compare"][0]["target"], &body["compare"][0]["result"]), (&"MOD".into(), &"EQUAL".into()));
    let put = body["success"][0]["request_put"].as_object().unwrap();
    assert!(!put.contains_key("lease"), "never under a lease");
    assert_eq!(BASE64.decode(put["value"].as_str().unwrap()).unwrap(), sample(1).to_json().as_bytes());
    let created = Call::swap(KEY, None, &sample(1)).unwrap().body.unwrap();
    assert!(created.contains(r#""mod_revision":"0""#), "{created}");
}

/// To etcd 0 means that there is no such key: as a revision it would create the record anew.
#[test]
fn revisions_that_no_key_can_have_are_never_asked_for() {
    for impossible in [0, 1 << 63, u64::MAX] {
        assert_eq!(Call::swap(KEY, Some(Revision(impossible)), &sample(1)), None);
    }
}

#[test]
fn good_answers() {
    let found = reply(200, good()).found(KEY).unwrap();
    assert_eq!(found.header, Header { cluster_id: 12_297_829_382_473_034_410, revision: 9 });
    assert_eq!(found.record, Some(Versioned { revision: Revision(5), record: sample(3) }));
    assert_eq!(reply(200, format!("{{{}}}", header(1))).found(KEY).unwrap().record, None);
    let swapped = |body: String, expected| reply(200, body).swapped(KEY, expected).unwrap().applied;
    assert_eq!(swapped(applied(6), Some(Revision(5))), Some(Revision(6)));
    assert_eq!(swapped(applied(2), None), Some(Revision(2)));
    assert_eq!(swapped(conflict(9, &stored(7)), Some(Revision(5))), None);
    assert_eq!(swapped(conflict(9, &stored(7)), None), None);
    assert_eq!(swapped(conflict(9, ""), Some(Revision(5))), None);
    assert_eq!(reply(200, format!(r#"{{{},"token":"Ab.13"}}"#, header(1))).token().unwrap(), "Ab.13");
    let largest = Record { note: "\u{1}".repeat(MAX_NOTE_BYTES), ..sample(1) };
    let long = range(9, &key_value(KEY, 5, &largest.to_json()));
    assert_eq!(reply(200, long).found(KEY).unwrap().record.unwrap().record, largest);
}

/// The longest record that is accepted also fits into the longest reply that is read.
#[test]
fn the_limit_of_a_reply_leaves_room_for_the_longest_record() {
    let padded = format!("{}{}", sample(1).to_json(), " ".repeat(MAX_RECORD_BYTES - sample(1).to_json().len()));
    let body = range(9, &key_value(KEY, 5, &padded));
    assert!(body.len() <= MAX_REPLY_BYTES);
    assert_eq!(reply(200, body).found(KEY).unwrap().record.unwrap().record, sample(1));
    let longer = range(9, &key_value(KEY, 5, &format!("{padded} ")));
    assert_eq!(reply(200, longer).found(KEY), Err(ReplyError::Record(RecordError::TooLong(MAX_RECORD_BYTES + 1))));
}

#[test]
fn what_is_no_answer_has_a_name() {
    let read = |status, body: String| reply(status, body).found(KEY).unwrap_err();
    let is_not_json = |error: ReplyError| assert!(matches!(error, ReplyError::NotJson { .. }), "{error:?}");
    is_not_json(read(200, String::new()));
    is_not_json(read(200, "<html>\u{1b}[2J502 Bad Gateway</html>".into()));
    is_not_json(read(502, "<html>502 Bad Gateway</html>".into()));
    is_not_json(read(404, "Not Found".into()));
    is_not_json(read(200, good()[..good().len() - 1].into()));
    is_not_json(read(500, good()));
    assert_eq!(read(301, good()), ReplyError::Redirect(301));
    assert_eq!(read(302, String::new()), ReplyError::Redirect(302));
    assert_eq!(read(200, " ".repeat(MAX_REPLY_BYTES + 1)), ReplyError::TooLong);
    let gzip = HttpReply { encoding: Some("gzip".into()), ..reply(200, good()) };
    assert!(matches!(gzip.found(KEY), Err(ReplyError::Encoded(_))));
    let is_malformed = |error: ReplyError| assert!(matches!(error, ReplyError::Malformed(_)), "{error:?}");
    is_malformed(read(200, "{}".into()));
    is_malformed(read(200, "[]".into()));
    is_malformed(read(200, format!("{{\"x\":{}{}}}", "[".repeat(5000), "]".repeat(5000))));
    is_malformed(read(200, r#"{"header":{"revision":"3"}}"#.into()));
    is_malformed(read(200, good().replace(r#""9""#, r#""-9""#)));
    is_malformed(read(200, good().replace(r#""9""#, "9.5")));
    is_not_json(read(200, good().replace(r#""9""#, "9e400")));
    is_malformed(read(200, good().replace(r#""9""#, r#""99999999999999999999""#)));
    assert!(!read(200, "<\u{1b}[2J\nhtml>".into()).to_string().contains(char::is_control), "safe to print");
}

#[test]
fn answers_that_contradict_the_question_are_refused() {
    let read = |body: String| reply(200, body).found(KEY).unwrap_err();
    let contradictory = |error: ReplyError| assert!(matches!(error, ReplyError::Contradictory(_)), "{error:?}");
    let value = sample(3).to_json();
    contradictory(read(range(9, &key_value("/ft/y/record", 5, &value))));
    contradictory(read(range(9, &key_value(KEY, 0, &value))));
    contradictory(read(range(4, &key_value(KEY, 5, &value))));
    contradictory(read(range(9, &[key_value(KEY, 5, &value), key_value(KEY, 6, &value)].join(","))));
    assert_eq!(read(good().replace(&BASE64.encode(&value), "%%%")), ReplyError::Base64("the value"));
    assert_eq!(read(good().replace(&BASE64.encode(KEY), "%%%")), ReplyError::Base64("the key"));
    let newer = range(9, &key_value(KEY, 5, &value.replace(r#""v":1"#, r#""v":2"#)));
    assert_eq!(read(newer), ReplyError::Record(RecordError::Newer(2)));
    assert!(matches!(read(range(9, &key_value(KEY, 5, "hello"))), ReplyError::Record(RecordError::Malformed(_))));

    let swap = |body: String| reply(200, body).swapped(KEY, Some(Revision(5))).unwrap_err();
    // A header alone: nobody says which branch was taken.
    contradictory(swap(format!("{{{}}}", header(9))));
    contradictory(swap(format!(r#"{{{},"succeeded":true}}"#, header(9))));
    contradictory(swap(applied(5)));
    contradictory(swap(applied(9).replace("true", "false")));
    contradictory(swap(conflict(9, &stored(7)).replace(r#""responses""#, r#""succeeded":true,"responses""#)));
    contradictory(swap(conflict(9, &stored(5))));
    contradictory(swap(conflict(9, &stored(7).replace(&BASE64.encode(KEY), &BASE64.encode("/other")))));
    for error in [swap(applied(5)), swap("{}".into()), swap(String::new())] {
        assert!(!error.certainly_not_done(), "{error}");
    }
}

#[test]
fn refusals_say_what_became_of_the_request() {
    let refused = |status, message: &str, code| {
        // The three forms of etcd 3.4, 3.5 and 3.6.
        let forms = [
            format!(r#"{{"error":"{message}","message":"{message}","code":{code}}}"#),
            format!(r#"{{"error":"{message}","code":{code}}}"#),
            format!(r#"{{"code":{code},"message":"{message}","details":[]}}"#),
        ];
        let errors = forms.map(|body| reply(status, body).swapped(KEY, None).unwrap_err());
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        errors[0].clone()
    };
    let token = refused(401, "etcdserver: invalid auth token", 16);
    assert!(token.certainly_not_done() && token.wants_new_token() && !token.needs_a_person());
    let old = refused(400, "etcdserver: revision of auth store is old", 3);
    assert!(old.certainly_not_done() && old.wants_new_token());
    let denied = refused(403, "etcdserver: permission denied", 7);
    assert!(denied.certainly_not_done() && !denied.wants_new_token() && denied.needs_a_person());
    let full = refused(429, "etcdserver: mvcc: database space exceeded", 8);
    assert!(full.certainly_not_done() && !full.needs_a_person());
    // It was proposed; whether it was applied nobody knows.
    for (status, message, code) in [
        (503, "etcdserver: request timed out", 14),
        (503, "etcdserver: request timed out, possibly due to previous leader failure", 14),
        (503, "etcdserver: leader changed", 14),
        (429, "grpc: received message larger than max", 8),
        (500, "etcdserver: invalid auth token ", 13),
        (504, "context deadline exceeded", 4),
    ] {
        assert!(!refused(status, message, code).certainly_not_done(), "{message}");
    }
    // An error is one whatever the status says.
    let hidden = reply(200, r#"{"error":"etcdserver: no leader","code":14}"#).swapped(KEY, None).unwrap_err();
    assert!(matches!(hidden, ReplyError::Refused { status: 200, .. }) && !hidden.certainly_not_done());
}

#[test]
fn tokens_that_would_break_a_header_are_refused() {
    for token in ["", "a b", "a\\r\\nX: y", "\\u00e9", &"a".repeat(5000)] {
        let body = format!(r#"{{{},"token":"{token}"}}"#, header(1));
        assert!(matches!(reply(200, body).token(), Err(ReplyError::Malformed(_))), "{token}");
    }
}

#[test]
fn versions_are_judged_by_their_line() {
    let worth = |text: &str| Version::parse(text).map(Version::worth);
    let stale = |major, minor, patch| Some(Worth::Stale(Version { major, minor, patch }));
    assert_eq!(worth("3.3.27"), Some(Worth::TooOld));
    assert_eq!(worth("2.9.9"), Some(Worth::TooOld));
    assert_eq!(worth("3.4.23"), stale(3, 4, 42));
    assert_eq!(worth("3.5.27"), stale(3, 5, 28));
    assert_eq!(worth("3.6.0-rc.1"), stale(3, 6, 9));
    for good in ["3.4.42", "3.5.28", "3.6.9", "3.6.10+git", "3.7.0", "4.0.0"] {
        assert_eq!(worth(good), Some(Worth::Good), "{good}");
    }
    for none in ["", "3.4", "3.4.1.2", "v3.4.1", "3.4.-1", "3.4.99999999999"] {
        assert_eq!(worth(none), None, "{none}");
    }
}

#[test]
fn history_notices_other_clusters_and_older_stores() {
    let header = |cluster_id, revision| Header { cluster_id, revision };
    let mut history = History::new(None);
    history.admit(header(7, 10)).unwrap();
    history.admit(header(7, 10)).unwrap();
    let foreign = Err(HistoryError::ForeignCluster { ours: 7, found: 8 });
    assert_eq!(history.admit(header(8, 11)), foreign);
    assert_eq!(history.admit(header(7, 9)), Err(HistoryError::Backwards { seen: 10, found: 9 }));
    history.admit(header(7, 12)).unwrap();
    history.forget_revision();
    history.admit(header(7, 3)).unwrap();
    assert_eq!(history.admit(header(8, 11)), foreign, "the cluster is never forgotten");
    assert_eq!(History::new(Some(7)).admit(header(8, 1)), foreign);
}

/// Every cut and every flipped bit of a good answer gives an answer or an error, and never another record under the same revision.
#[test]
fn damaged_answers_do_not_panic() {
    let bodies = [good(), applied(6), conflict(9, &stored(7))];
    let mut cases = 0_u32;
    for body in bodies {
        let bytes = body.into_bytes();
        let cut = (0..bytes.len()).map(|length| bytes[..length].to_vec());
        let flipped = (0..bytes.len() * 8).map(|bit| {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        });
        for damaged in cut.chain(flipped) {
            let damaged = reply(200, damaged);
            cases += 1;
            let _whatever = (damaged.found(KEY), damaged.token(), damaged.version());
            // What is cut is never taken for an outcome.
            if damaged.body.len() < bytes.len() {
                assert!(damaged.swapped(KEY, Some(Revision(5))).is_err());
                assert!(damaged.found(KEY).is_err());
            }
        }
    }
    assert!(cases > 9_000, "{cases}");
}
