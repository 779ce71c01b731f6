use super::*;
use crate::status::tests_support::{board, protected};

fn server() -> (HealthServer, StatusBoard) {
    let board = board();
    let server = HealthServer::start("127.0.0.1:0".parse().unwrap(), board.clone()).unwrap();
    (server, board)
}

fn send(server: &HealthServer, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // A server that answers before it read everything may reset the connection.
    let _ = stream.write_all(request);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

fn get(server: &HealthServer, path: &str) -> (u16, String) {
    let text = send(server, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let length = format!("Content-Length: {}\r\n", body.len());
    assert!(head.contains(&length), "{head}");
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[test]
fn probes_follow_the_state() {
    let (server, board) = server();
    assert_eq!(get(&server, "/livez").0, 200);
    assert_eq!(get(&server, "/readyz").0, 503, "starting");
    assert_eq!(get(&server, "/protected").0, 503);
    board.apply(&protected());
    assert_eq!((get(&server, "/readyz").0, get(&server, "/healthz").0), (200, 200));
    assert_eq!((get(&server, "/primary").0, get(&server, "/backup").0, get(&server, "/protected").0), (200, 503, 200));
    let (_, text) = get(&server, "/readyz?verbose");
    assert!(text.contains("[+]armed ok") && text.contains("[!]link not ok"), "{text}");
    board.ending();
    let (code, text) = get(&server, "/readyz?verbose");
    assert!(code == 503 && text.contains("[-]ending failed"), "{text}");
}

#[test]
fn status_and_metrics_are_served() {
    let (server, board) = server();
    board.apply(&protected());
    let (code, body) = get(&server, "/status.json");
    let status: Status = serde_json::from_str(&body).unwrap();
    assert!(code == 200 && status.protected);
    assert!(get(&server, "/metrics").1.contains("\nft_protected 1\n"));
    assert_eq!(get(&server, "/").0, 200);
}

#[test]
fn wrong_requests_are_answered_and_nothing_is_writable() {
    let (server, _board) = server();
    assert_eq!(get(&server, "/../etc/passwd").0, 404);
    for (request, code) in [
        (&b"POST /status.json HTTP/1.1\r\n\r\n"[..], "405"),
        (b"DELETE / HTTP/1.1\r\n\r\n", "405"),
        (b"GET / HTTP/2\r\n\r\n", "400"),
        (b"GET /\r\n\r\n", "400"),
        (b"\r\n\r\n", "400"),
        (b"\xff\xfe \0 HTTP/1.1\r\n\r\n", "400"),
    ] {
        let text = send(&server, request);
        assert_eq!(&text[9..12], code, "{request:?}");
    }
    let head = send(&server, b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"));
}

#[test]
fn long_and_slow_requests_are_cut_off_and_the_server_goes_on() {
    let (server, _board) = server();
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(64 * 1024));
    let text = send(&server, long.as_bytes());
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 431"), "{text}");
    // More idle connections than there are seats: they are let go, and probes work again.
    let idle: Vec<TcpStream> = (0..100).filter_map(|_| TcpStream::connect(server.address()).ok()).collect();
    let started = Instant::now();
    let served = loop {
        let text = send(&server, b"GET /livez HTTP/1.1\r\n\r\n");
        if text.starts_with("HTTP/1.1 ") || started.elapsed() > Duration::from_secs(10) {
            break text;
        }
    };
    assert!(served.starts_with("HTTP/1.1 "), "after {:?}", started.elapsed());
    drop(idle);
}

#[test]
fn a_port_in_use_is_an_error() {
    let (server, board) = server();
    let error = HealthServer::start(server.address(), board).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}
