//! HTTP/1.1 as far as downloading needs it: GET, redirects, ranges, over TLS, through a proxy.
//!
//! Why not a client library: those at hand bring an asynchronous runtime, a C library, or types that unify features with the
//! framework's own dependencies. TLS is `rustls` with Mozilla's roots, headers are parsed by `httparse`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::proxy::{Proxies, Proxy};

const CONNECT: Duration = Duration::from_secs(15);
/// A connection on which nothing comes for so long is a broken one.
const SILENCE: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 8;
const MAX_HEADERS: usize = 100;
const MAX_HEAD: u64 = 64 << 10;

/// An answer; its body is read when wanted.
pub(crate) struct Response {
    /// 200 and the like.
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    /// An error of it is a connection that broke; its end is where the server said it would be.
    pub(crate) body: Box<dyn Read>,
}

impl Response {
    /// A header, whatever its case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self
            .headers
            .iter()
            .filter(|(own, _)| own.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.as_str())
    }
}

/// A parsed `http://` or `https://` URL.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Url {
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

impl Url {
    fn parse(text: &str) -> io::Result<Self> {
        let malformed =
            || io::Error::other(format!("`{text}` is no URL of the form https://host/path"));
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(malformed()),
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| malformed())?)
            }
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || host.contains('@') || !printable(rest) {
            return Err(malformed());
        }
        let path = if path.starts_with('/') {
            path.to_string()
        } else {
            format!("/{path}")
        };
        Ok(Self {
            tls,
            host: host.into(),
            port,
            path,
        })
    }

    /// Where a `Location` leads from here.
    fn join(&self, location: &str) -> io::Result<Self> {
        match location.strip_prefix('/') {
            Some(_) if !location.starts_with("//") => Ok(Self {
                path: location.into(),
                ..self.clone()
            }),
            _ => Self::parse(location),
        }
    }

    fn same_place(&self, other: &Self) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }
}

/// How servers are reached.
#[derive(Clone, Default)]
pub(super) struct Route {
    pub(super) proxies: Proxies,
    /// A file of certificates, in PEM, of who is trusted in place of Mozilla's list; of a proxy that looks into what it passes on.
    pub(super) authorities: Option<PathBuf>,
}

/// Asks for `url`, and for where it leads; `token` is told to its own host alone, and never to one without TLS that a
/// redirect leads to.
pub(super) fn get(
    route: &Route,
    url: &str,
    token: Option<&str>,
    range_from: u64,
) -> io::Result<Response> {
    let first = Url::parse(url)?;
    let mut url = first.clone();
    for _ in 0..=MAX_REDIRECTS {
        let token = token.filter(|_| url.same_place(&first));
        let answer = ask(route, &url, token, range_from)?;
        match (answer.status, answer.header("location")) {
            (301 | 302 | 303 | 307 | 308, Some(location)) => {
                let next = url.join(location)?;
                if url.tls && !next.tls {
                    return Err(io::Error::other(
                        "the server leads to an address without TLS",
                    ));
                }
                url = next;
            }
            _ => return Ok(answer),
        }
    }
    Err(io::Error::other("the server leads in a circle"))
}

fn ask(route: &Route, url: &Url, token: Option<&str>, range_from: u64) -> io::Result<Response> {
    let proxy = route.proxies.of(url.tls, &url.host, url.port)?;
    let mut stream = connect(route, url, proxy.as_ref())?;
    let port = match url.port {
        80 | 443 => String::new(),
        port => format!(":{port}"),
    };
    // Without TLS the proxy reads the request, and has to be told the server.
    let told = proxy.filter(|_| !url.tls);
    let server = match &told {
        Some(_) => format!("http://{}{port}", url.host),
        None => String::new(),
    };
    let mut request = format!(
        "GET {server}{} HTTP/1.1\r\nHost: {}{port}\r\nUser-Agent: flux-lora/{}\r\nAccept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n",
        url.path,
        url.host,
        env!("CARGO_PKG_VERSION")
    );
    if let Some(proxy) = &told {
        request.push_str(&proxy.login());
    }
    if let Some(token) = token {
        request.push_str(&format!("Authorization: Bearer {token}\r\n"));
    }
    if range_from > 0 {
        request.push_str(&format!("Range: bytes={range_from}-\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let answer = read_response(BufReader::with_capacity(1 << 16, stream))?;
    match told {
        Some(proxy) if answer.status == 407 => Err(proxy.refusal(407)),
        _ => Ok(answer),
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn connect(route: &Route, url: &Url, proxy: Option<&Proxy>) -> io::Result<Box<dyn Stream>> {
    let host = url.host.trim_matches(['[', ']']);
    let mut stream = match proxy {
        None => dial(host, url.port)?,
        Some(Proxy { host, port, .. }) => dial(host, *port).map_err(|error| {
            let problem = format!("the proxy {host}:{port} cannot be reached: {error}");
            io::Error::new(error.kind(), problem)
        })?,
    };
    if !url.tls {
        return Ok(Box::new(stream));
    }
    if let Some(proxy) = proxy {
        proxy.connect(&mut stream, &url.host, url.port)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots(route.authorities.as_deref())?)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_string()).map_err(io::Error::other)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    Ok(Box::new(StreamOwned::new(connection, stream)))
}

/// A connection to the first address of a host that takes one.
fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::Error::other(format!("`{host}` has no address"));
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                return Ok(stream);
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Who may say that a server is who it says.
fn roots(authorities: Option<&Path>) -> io::Result<RootCertStore> {
    let Some(path) = authorities else {
        let roots = webpki_roots::TLS_SERVER_ROOTS.into();
        return Ok(RootCertStore { roots });
    };
    let unusable =
        |problem: String| io::Error::other(format!("SSL_CERT_FILE {}: {problem}", path.display()));
    let mut store = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|e| unusable(e.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
        store
            .add(certificate)
            .map_err(|e| unusable(e.to_string()))?;
    }
    match store.is_empty() {
        true => Err(unusable("there is no certificate in it".into())),
        false => Ok(store),
    }
}

fn read_response(mut reader: BufReader<Box<dyn Stream>>) -> io::Result<Response> {
    let mut head = Vec::new();
    loop {
        let before = head.len();
        reader
            .by_ref()
            .take(MAX_HEAD)
            .read_until(b'\n', &mut head)?;
        if head.len() == before || head.len() as u64 > MAX_HEAD {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if head.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    parsed.parse(&head).map_err(io::Error::other)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    let headers = parsed
        .headers
        .iter()
        .map(|header| (header.name.to_string(), text(header.value)));
    let mut response = Response {
        status: parsed.code.unwrap_or_default(),
        headers: headers.collect(),
        body: Box::new(io::empty()),
    };
    let chunked = response
        .header("transfer-encoding")
        .is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
    let length = response
        .header("content-length")
        .and_then(|value| value.parse::<u64>().ok());
    response.body = match (chunked, length) {
        (true, _) => Box::new(Chunked {
            reader,
            left: 0,
            ended: false,
        }),
        (false, Some(left)) => Box::new(Sized { reader, left }),
        (false, None) => Box::new(reader),
    };
    Ok(response)
}

/// A body of a known length; one that ends before is an error.
struct Sized<R> {
    reader: R,
    left: u64,
}

impl<R: Read> Read for Sized<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // What a server does after the last byte is its own affair: some close without the word that TLS has for it.
        if self.left == 0 {
            return Ok(0);
        }
        let wanted = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.reader.read(&mut into[..wanted])?;
        if read == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// A body in chunks, each with its length before it.
struct Chunked<R> {
    reader: R,
    left: u64,
    ended: bool,
}

impl<R: BufRead> Chunked<R> {
    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.by_ref().take(1024).read_line(&mut line)?;
        match line.ends_with('\n') {
            true => Ok(line.trim().to_string()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<R: BufRead> Read for Chunked<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.ended || into.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default();
            self.left = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
            if self.left == 0 {
                self.ended = true;
                return Ok(0);
            }
        }
        let wanted = into
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.reader.read(&mut into[..wanted])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        if self.left == 0 {
            self.line()?;
        }
        Ok(read)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_host_port_and_path() {
        let url = |text| Url::parse(text).unwrap();
        let hub = url("https://huggingface.co/api/models?x=1");
        assert_eq!(
            (hub.tls, hub.host.as_str(), hub.port, hub.path.as_str()),
            (true, "huggingface.co", 443, "/api/models?x=1")
        );
        assert_eq!(url("http://[::1]:81").port, 81);
        assert_eq!(url("http://a?x").path, "/?x");
        for text in [
            "ftp://a/b",
            "https://",
            "https://u@evil/",
            "https://a/b c",
            "https://a:x/",
        ] {
            assert!(Url::parse(text).is_err(), "{text}");
        }
        assert_eq!(
            hub.join("/other").unwrap(),
            url("https://huggingface.co/other")
        );
        assert_eq!(hub.join("https://cdn/x").unwrap(), url("https://cdn/x"));
    }

    #[test]
    fn chunks_are_put_together_and_a_cut_is_an_error() {
        let read = |bytes: &[u8]| {
            let mut text = String::new();
            Chunked {
                reader: bytes,
                left: 0,
                ended: false,
            }
            .read_to_string(&mut text)
            .map(|_| text)
        };
        assert_eq!(
            read(b"4\r\nWiki\r\n5;x=y\r\npedia\r\n0\r\n\r\n").unwrap(),
            "Wikipedia"
        );
        for cut in ["4\r\nWi", "4\r\nWiki\r\n", "zz\r\nWiki\r\n"] {
            assert!(read(cut.as_bytes()).is_err(), "{cut}");
        }
        let mut body = Sized {
            reader: &b"abc"[..],
            left: 4,
        };
        assert!(body.read_to_end(&mut Vec::new()).is_err());
    }
}
