//! Against a server on this machine that speaks the small part of the Hub's API, badly where a test says so.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lora_core::files::digest::sha256_hex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;

use super::files::Replaced;
use super::http::Route;
use super::proxy::Proxies;
use super::source::Hub;
use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const BIG: &str = "transformer/diffusion_pytorch_model.safetensors";

/// How a server behaves.
#[derive(Clone, Default)]
struct Manners {
    /// Bytes of a large file after which the connection is cut.
    cut_after: Option<usize>,
    /// How many of the answers with a large file have a wrong byte.
    wrong: usize,
    /// Whether ranges are known.
    ranges: bool,
    /// Where large files are.
    elsewhere: Option<String>,
    /// Status and error code of every answer.
    refuses: Option<(u16, &'static str)>,
}

struct Server {
    endpoint: String,
    manners: Arc<Mutex<Manners>>,
    requests: Arc<Mutex<Vec<String>>>,
}

fn contents() -> BTreeMap<&'static str, Vec<u8>> {
    let big = (0..300_000_u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    BTreeMap::from([
        ("README.md", b"# a model".to_vec()),
        (
            "model_index.json",
            b"{\"_class_name\": \"FluxPipeline\"}".to_vec(),
        ),
        ("flux1-dev.safetensors", vec![7; 1000]),
        ("transformer/config.json", b"{}".to_vec()),
        (BIG, big),
    ])
}

impl Server {
    fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let manners = Arc::new(Mutex::new(manners));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (shared, seen) = (manners.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = serve(stream, &shared, &seen);
            }
        });
        Self {
            endpoint,
            manners,
            requests,
        }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            token: Some("hf_secret".into()),
            cache: cache.into(),
            offline: false,
            route: Route::default(),
            pause: Duration::from_millis(1),
        }
    }

    fn count(&self, what: &str) -> usize {
        self.requests
            .lock()
            .unwrap()
            .iter()
            .filter(|request| request.contains(what))
            .count()
    }
}

fn serve(
    mut stream: TcpStream,
    manners: &Mutex<Manners>,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while reader.read_line(&mut head)? > 2 {}
    seen.lock().unwrap().push(head.clone());
    let path = head.split(' ').nth(1).unwrap_or_default().to_string();
    let mut manners = manners.lock().unwrap();
    if let Some((status, code)) = manners.refuses {
        return write!(
            stream,
            "HTTP/1.1 {status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let contents = contents();
    if path.starts_with("/api/models/owner/tiny/revision/") {
        let git = |bytes: &[u8]| {
            let mut sha1 = sha1_smol::Sha1::new();
            sha1.update(format!("blob {}\0", bytes.len()).as_bytes());
            sha1.update(bytes);
            sha1.digest().to_string()
        };
        let sibling = |(name, bytes): (&&str, &Vec<u8>)| match name.ends_with(".safetensors") {
            true => {
                json!({"rfilename": name, "size": bytes.len(), "blobId": "f".repeat(40), "lfs": {"sha256": sha256_hex(bytes), "size": bytes.len(), "pointerSize": 134}})
            }
            false => json!({"rfilename": name, "size": bytes.len(), "blobId": git(bytes)}),
        };
        let body =
            json!({"sha": COMMIT, "siblings": contents.iter().map(sibling).collect::<Vec<_>>()})
                .to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let name = path
        .strip_prefix(&format!("/owner/tiny/resolve/{COMMIT}/"))
        .unwrap_or_default();
    if let Some(elsewhere) = manners.elsewhere.as_ref().filter(|_| name == BIG) {
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: {elsewhere}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let Some(content) = contents.get(name) else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let mut content = content.clone();
    if name == BIG && manners.wrong > 0 {
        manners.wrong -= 1;
        content[1000] ^= 1;
    }
    let range = head.lines().find_map(|line| {
        line.to_lowercase()
            .strip_prefix("range: bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let from = range.filter(|_| manners.ranges).unwrap_or(0);
    let status = if from > 0 {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let rest = &content[from..];
    let sent = manners
        .cut_after
        .filter(|_| name == BIG)
        .map_or(rest.len(), |cut| cut.min(rest.len()));
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        rest.len()
    )?;
    stream.write_all(&rest[..sent])
}

fn id() -> HubId {
    HubId::parse("owner/tiny").unwrap()
}

fn assert_complete(snapshot: &Path) {
    for (name, content) in contents() {
        let path = snapshot.join(name);
        match ["README.md", "flux1-dev.safetensors"].contains(&name) {
            true => assert!(!path.exists(), "{name} is not needed"),
            false => assert!(fs::read(path).unwrap() == content, "{name}"),
        }
    }
}

#[test]
fn a_pipeline_is_downloaded_once_to_where_python_looks_for_it() {
    let server = Server::start(Manners {
        ranges: true,
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());
    let snapshot = hub.snapshot(&id(), Replaced::default()).unwrap();
    assert_eq!(
        snapshot,
        cache
            .path()
            .join("models--owner--tiny/snapshots")
            .join(COMMIT)
    );
    assert_complete(&snapshot);
    assert_eq!(
        fs::read_to_string(cache.path().join("models--owner--tiny/refs/main")).unwrap(),
        COMMIT
    );
    let blob = cache
        .path()
        .join("models--owner--tiny/blobs")
        .join(sha256_hex(&contents()[BIG]));
    assert!(blob.is_file());
    #[cfg(unix)]
    assert_eq!(
        fs::canonicalize(snapshot.join(BIG)).unwrap(),
        fs::canonicalize(blob).unwrap()
    );
    let requests = server.requests.lock().unwrap().len();
    assert_eq!(
        server.count("authorization: Bearer hf_secret")
            + server.count("Authorization: Bearer hf_secret"),
        requests
    );

    // Again: one question, no file. Offline: not a word.
    hub.snapshot(&id(), Replaced::default()).unwrap();
    assert_eq!(server.requests.lock().unwrap().len(), requests + 1);
    let offline = Hub {
        offline: true,
        ..hub
    };
    for revision in ["owner/tiny".to_string(), format!("owner/tiny@{COMMIT}")] {
        let id = HubId::parse(&revision).unwrap();
        assert_eq!(
            offline.snapshot(&id, Replaced::default()).unwrap(),
            snapshot
        );
    }
    let other = offline.snapshot(&HubId::parse("owner/other").unwrap(), Replaced::default());
    let message = other.unwrap_err().to_string();
    assert!(
        message.contains("owner/other is not on this disk") && message.contains("--offline"),
        "{message}"
    );
    assert_eq!(server.requests.lock().unwrap().len(), requests + 1);
}

#[test]
fn a_download_goes_on_where_the_connection_broke() {
    let server = Server::start(Manners {
        ranges: true,
        cut_after: Some(250_000),
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    assert_complete(
        &server
            .hub(cache.path())
            .snapshot(&id(), Replaced::default())
            .unwrap(),
    );
    assert_eq!(server.count(BIG), 5);
    assert_eq!(server.count("ange: bytes=1000000-"), 1);

    // A program that was stopped: the next one goes on with what is there.
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--owner--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let big = &contents()[BIG];
    fs::write(
        blobs.join(format!("{}.incomplete", sha256_hex(big))),
        &big[..1_100_000],
    )
    .unwrap();
    assert_complete(
        &server
            .hub(cache.path())
            .snapshot(&id(), Replaced::default())
            .unwrap(),
    );
    assert_eq!(server.count("ange: bytes=1100000-"), 1);
}

/// A proxy on this machine, which notes what it is asked for.
struct ProxyServer {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ProxyServer {
    /// `server` is where every name leads.
    fn start(server: &str, login: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, server) = (asked.clone(), server.to_string());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, server) = (seen.clone(), server.clone());
                std::thread::spawn(move || pass_on(stream, &server, login, &seen));
            }
        });
        Self { address, asked }
    }
}

fn pass_on(
    mut stream: TcpStream,
    server: &str,
    login: &str,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    seen.lock().unwrap().push(head.clone());
    if !head.contains(&format!("Proxy-Authorization: Basic {login}\r\n")) {
        return stream
            .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
    }
    let mut upstream = TcpStream::connect(server)?;
    if head.starts_with("CONNECT ") {
        stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    } else {
        // `GET http://hub.test/path` becomes `GET /path`.
        let (method, rest) = head.split_once(" http://").unwrap();
        let path = &rest[rest.find('/').unwrap()..];
        write!(upstream, "{method} {path}")?;
    }
    let (mut from, mut to) = (stream.try_clone()?, upstream.try_clone()?);
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    let copied = std::io::copy(&mut upstream, &mut stream);
    stream.shutdown(std::net::Shutdown::Both)?;
    copied.map(drop)
}

/// TLS in front of `server`, with the certificate of `hub.test`; where the server cuts its answer this cuts too.
fn tls_before(server: &str) -> String {
    let at = |name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/hub/testing")
            .join(name)
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(at("server.pem")).unwrap()],
            PrivateKeyDer::from_pem_file(at("server.key")).unwrap(),
        )
        .unwrap();
    let (config, server) = (Arc::new(config), server.to_string());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (config, server) = (config.clone(), server.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let connection = rustls::ServerConnection::new(config).unwrap();
                let mut tls = rustls::StreamOwned::new(connection, stream);
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    tls.read_exact(&mut byte)?;
                    head.push(byte[0]);
                }
                let mut upstream = TcpStream::connect(server)?;
                upstream.write_all(&head)?;
                std::io::copy(&mut upstream, &mut tls)?;
                tls.flush()
            });
        }
    });
    address
}

#[test]
fn a_proxy_is_gone_through_and_a_broken_connection_taken_up_through_it() {
    let server = Server::start(Manners {
        ranges: true,
        cut_after: Some(500_000),
        ..Manners::default()
    });
    let plain = server.endpoint.trim_start_matches("http://");
    let login = "YW5uYTpwQHNz"; // anna:p@ss
    let ca = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hub/testing/ca.pem");
    for (endpoint, place, asked) in [
        (
            "https://hub.test",
            tls_before(plain),
            "CONNECT hub.test:443 HTTP/1.1\r\n",
        ),
        ("http://hub.test", plain.to_string(), "GET http://hub.test/"),
    ] {
        let proxy = ProxyServer::start(&place, login);
        let address = format!("http://anna:p%40ss@{}", proxy.address);
        let through = |address: &str, except: Option<&str>| Route {
            proxies: Proxies {
                https: Some(address.into()),
                http: Some(address.into()),
                except: except.map(String::from),
            },
            authorities: Some(ca.clone()),
        };
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub {
            endpoint: endpoint.into(),
            route: through(&address, None),
            ..server.hub(cache.path())
        };
        let before = server.count("Range: bytes=500000-");
        assert_complete(&hub.snapshot(&id(), Replaced::default()).unwrap());
        assert_eq!(
            server.count("Range: bytes=500000-"),
            before + 1,
            "{endpoint}"
        );
        let seen = proxy.asked.lock().unwrap().clone();
        assert!(seen.len() >= 6, "{seen:?}");
        assert!(seen.iter().all(|head| head.starts_with(asked)), "{seen:?}");
        let tls = endpoint.starts_with("https");
        assert!(
            !tls || seen.iter().all(|head| !head.contains("hf_secret")),
            "{seen:?}"
        );

        // What it does not do is said, and a server that is excepted is not asked through it.
        let cache = tempfile::tempdir().unwrap();
        let unnamed = format!("http://{}", proxy.address);
        let refused = |route: Route| {
            let hub = Hub {
                route,
                ..hub.clone()
            };
            let hub = Hub {
                cache: cache.path().into(),
                ..hub
            };
            let error = hub.snapshot(&id(), Replaced::default()).unwrap_err();
            error.to_string()
        };
        let message = refused(through(&unnamed, None));
        assert!(message.contains("wants a name and a password"), "{message}");
        let asked = proxy.asked.lock().unwrap().len();
        let message = refused(through(&address, Some("localhost,.test")));
        assert!(!message.contains("proxy"), "{message}");
        assert_eq!(proxy.asked.lock().unwrap().len(), asked);
        let message = refused(through("socks5://127.0.0.1:9", None));
        assert!(message.contains("only `http` is known here"), "{message}");
        let strict = Route {
            authorities: None,
            ..through(&address, None)
        };
        assert_eq!(
            tls,
            refused_by_tls(&hub, strict, cache.path()),
            "{endpoint}"
        );
    }
}

/// Whether a hub that trusts Mozilla's list alone refuses the certificate.
fn refused_by_tls(hub: &Hub, route: Route, cache: &Path) -> bool {
    let hub = Hub {
        route,
        cache: cache.into(),
        ..hub.clone()
    };
    let found = hub.snapshot(&id(), Replaced::default());
    found.is_err_and(|error| error.to_string().contains("UnknownIssuer"))
}

#[test]
fn the_token_stays_with_the_host_it_is_for() {
    let store = Server::start(Manners {
        ranges: true,
        cut_after: Some(700_000),
        ..Manners::default()
    });
    let server = Server::start(Manners {
        elsewhere: Some(store.endpoint.clone()),
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    assert_complete(
        &server
            .hub(cache.path())
            .snapshot(&id(), Replaced::default())
            .unwrap(),
    );
    assert_eq!((server.count(BIG), store.count(BIG)), (2, 2));
    assert_eq!(server.count("hf_secret"), server.count("GET"));
    assert_eq!(store.count("hf_secret"), 0);
    assert_eq!(store.count("Range: bytes=700000-"), 1);
}

#[test]
fn a_server_without_ranges_is_read_from_the_beginning() {
    let server = Server::start(Manners {
        cut_after: Some(500_000),
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());
    let message = format!(
        "{:#}",
        hub.snapshot(&id(), Replaced::default()).unwrap_err()
    );
    assert!(
        message.contains(BIG)
            && message.contains("6 times in a row")
            && message.contains("goes on"),
        "{message}"
    );
    server.manners.lock().unwrap().cut_after = None;
    assert_complete(&hub.snapshot(&id(), Replaced::default()).unwrap());
}

#[test]
fn wrong_bytes_never_get_a_name() {
    let server = Server::start(Manners {
        ranges: true,
        wrong: 1,
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    assert_complete(
        &server
            .hub(cache.path())
            .snapshot(&id(), Replaced::default())
            .unwrap(),
    );
    assert_eq!(server.count(BIG), 2);

    server.manners.lock().unwrap().wrong = usize::MAX;
    let cache = tempfile::tempdir().unwrap();
    let message = format!(
        "{:#}",
        server
            .hub(cache.path())
            .snapshot(&id(), Replaced::default())
            .unwrap_err()
    );
    assert!(
        message.contains(BIG) && message.contains("digest"),
        "{message}"
    );
    let snapshot = cache
        .path()
        .join("models--owner--tiny/snapshots")
        .join(COMMIT);
    assert!(!snapshot.join(BIG).exists());
}

#[test]
fn a_refusal_says_what_to_do() {
    let server = Server::start(Manners::default());
    let cache = tempfile::tempdir().unwrap();
    let with_token = server.hub(cache.path());
    let without = Hub {
        token: None,
        ..with_token.clone()
    };
    for (hub, status, code, says) in [
        (&without, 401, "GatedRepo", "is gated: accept its terms on"),
        (&without, 401, "GatedRepo", "HF_TOKEN"),
        (
            &with_token,
            403,
            "GatedRepo",
            "the account of your token has no access yet",
        ),
        (
            &without,
            401,
            "RepoNotFound",
            "has no such repository, or it is private",
        ),
        (
            &with_token,
            404,
            "RepoNotFound",
            "has no such repository, or it is private",
        ),
        (
            &with_token,
            404,
            "RevisionNotFound",
            "has no branch, tag or commit `main`",
        ),
        (&with_token, 401, "", "refuses the token in HF_TOKEN"),
        (&with_token, 429, "", "asked too often"),
        (&with_token, 503, "", "answers 503"),
    ] {
        server.manners.lock().unwrap().refuses = Some((status, code));
        let message = hub
            .snapshot(&id(), Replaced::default())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(says) && message.contains("owner/tiny"),
            "{status} {code}: {message}"
        );
    }
}

#[test]
fn without_a_network_the_cache_is_used() {
    let server = Server::start(Manners {
        ranges: true,
        ..Manners::default()
    });
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());
    let snapshot = hub.snapshot(&id(), Replaced::default()).unwrap();
    // A port on which nobody listens.
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hub = Hub {
        endpoint: format!("http://{nobody}"),
        ..hub
    };
    assert_eq!(hub.snapshot(&id(), Replaced::default()).unwrap(), snapshot);
    let message = hub
        .snapshot(&HubId::parse("owner/other").unwrap(), Replaced::default())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("owner/other is no folder on this disk")
            && message.contains("cannot be reached"),
        "{message}"
    );
}

#[test]
fn what_is_a_repositorys_name() {
    let parse = |text| HubId::parse(text).map(|id| (id.repository, id.revision));
    assert_eq!(
        parse("black-forest-labs/FLUX.1-dev"),
        Some(("black-forest-labs/FLUX.1-dev".into(), "main".into()))
    );
    assert_eq!(
        parse("a/b@refs/pr/1"),
        Some(("a/b".into(), "refs/pr/1".into()))
    );
    for text in [
        "flux",
        "/models/flux",
        "a/b/c",
        "../flux",
        "./flux",
        "a/b@",
        "~/flux",
        "a/b c",
        "a/..",
        "a/b@../x",
    ] {
        assert_eq!(parse(text), None, "{text}");
    }
}
