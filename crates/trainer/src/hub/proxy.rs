//! The way to a server through a proxy, by the variables that curl, Python's programs and cargo read: `HTTPS_PROXY`, `HTTP_PROXY`,
//! `ALL_PROXY` and `NO_PROXY`, each in lower case too, which counts first.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// What the variables say. Not to be printed: a proxy's address may have a password.
#[derive(Clone, Default)]
pub(super) struct Proxies {
    pub(super) https: Option<String>,
    pub(super) http: Option<String>,
    pub(super) except: Option<String>,
}

/// A proxy that takes HTTP.
pub(super) struct Proxy {
    pub(super) host: String,
    pub(super) port: u16,
    /// What `Proxy-Authorization` says.
    authorization: Option<String>,
}

impl Proxies {
    /// From the environment, of which `variable` gives what is not empty.
    pub(super) fn from_env(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| variable(&name.to_lowercase()).or_else(|| variable(name));
        let all = either("ALL_PROXY");
        Self {
            https: either("HTTPS_PROXY").or_else(|| all.clone()),
            http: either("HTTP_PROXY").or(all),
            except: either("NO_PROXY"),
        }
    }

    /// The proxy for a server.
    ///
    /// # Errors
    /// An address that is no HTTP proxy's.
    pub(super) fn of(&self, tls: bool, host: &str, port: u16) -> io::Result<Option<Proxy>> {
        let (name, address) = match tls {
            true => ("HTTPS_PROXY", &self.https),
            false => ("HTTP_PROXY", &self.http),
        };
        let except = self.except.as_deref().unwrap_or_default();
        match address {
            Some(address) if !is_excepted(except, host, port) => {
                Proxy::parse(address).map(Some).map_err(|problem| {
                    io::Error::other(format!(
                        "{name} (or ALL_PROXY) {problem}: write http://HOST:PORT"
                    ))
                })
            }
            _ => Ok(None),
        }
    }
}

impl Proxy {
    /// The error says what is wrong, without the address, which may have a password.
    fn parse(address: &str) -> Result<Self, String> {
        let rest = match address.split_once("://") {
            None => address,
            Some(("http", rest)) => rest,
            Some((scheme, _)) => {
                return Err(format!(
                    "names a proxy of the kind `{scheme}`, and only `http` is known here"
                ));
            }
        };
        let rest = rest.trim_end_matches('/');
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, rest),
        };
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
            _ => (place, Some(80)),
        };
        let graphic = |text: &str| {
            text.bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'/')
        };
        match port {
            Some(port) if !host.is_empty() && graphic(host) => Ok(Self {
                host: host.trim_matches(['[', ']']).into(),
                port,
                authorization: login
                    .map(|login| format!("Basic {}", STANDARD.encode(unescaped(login)))),
            }),
            _ => Err("has no host and port".into()),
        }
    }

    /// A header line with the login, if there is one.
    pub(super) fn login(&self) -> String {
        let line = |value: &String| format!("Proxy-Authorization: {value}\r\n");
        self.authorization.as_ref().map(line).unwrap_or_default()
    }

    /// Makes `stream`, which leads to the proxy, lead to `host` through it.
    ///
    /// # Errors
    /// A proxy that does not want to.
    pub(super) fn connect(
        &self,
        stream: &mut (impl Read + Write),
        host: &str,
        port: u16,
    ) -> io::Result<()> {
        let (to, login) = (format!("{host}:{port}"), self.login());
        write!(stream, "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{login}\r\n")?;
        stream.flush()?;
        // No byte more than the answer: what follows belongs to the server.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            if head.len() > 1 << 16 {
                return Err(io::Error::other("the proxy's answer has no end"));
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Response::new(&mut headers);
        parsed.parse(&head).map_err(io::Error::other)?;
        match parsed.code.unwrap_or_default() {
            200..=299 => Ok(()),
            code => Err(self.refusal(code)),
        }
    }

    /// What it means that the proxy answers so.
    pub(super) fn refusal(&self, code: u16) -> io::Error {
        let (host, port) = (&self.host, self.port);
        io::Error::other(match code {
            407 => format!(
                "the proxy {host}:{port} wants a name and a password: HTTPS_PROXY=http://NAME:PASSWORD@{host}:{port}"
            ),
            _ => format!("the proxy {host}:{port} answers {code}"),
        })
    }
}

/// Whether `NO_PROXY` has the server: its name or one that it ends in, its address or a range of them (10.0.0.0/8), any with a
/// port; or `*`.
fn is_excepted(except: &str, host: &str, port: u16) -> bool {
    let host = host.trim_matches(['[', ']']).to_lowercase();
    let address: Option<Ipv4Addr> = host.parse().ok();
    except.split([',', ' ']).map(str::trim).any(|entry| {
        let entry = entry.to_lowercase();
        if let Some((range, bits)) = entry.split_once('/')
            && let (Some(address), Ok(range), Ok(bits @ 0..=32)) =
                (address, range.parse::<Ipv4Addr>(), bits.parse::<u32>())
        {
            let differ = u32::from(address) ^ u32::from(range);
            return differ.checked_shr(32 - bits).unwrap_or(0) == 0;
        }
        let (name, of_port) = match entry.rsplit_once(':') {
            Some((name, of_port)) if !name.contains(':') || name.ends_with(']') => {
                (name, of_port.parse().ok())
            }
            _ => (entry.as_str(), Some(port)),
        };
        let name = name
            .trim_matches(['[', ']'])
            .trim_start_matches("*.")
            .trim_start_matches('.');
        let ends_in = || {
            host.strip_suffix(name)
                .is_some_and(|rest| rest.ends_with('.'))
        };
        !name.is_empty() && of_port == Some(port) && (name == "*" || name == host || ends_in())
    })
}

/// A name and a password as they are, from how a URL has them.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_as_others_do() {
        let read = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> = set
                .iter()
                .map(|(n, v)| ((*n).into(), (*v).into()))
                .collect();
            Proxies::from_env(|name| set.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()))
        };
        let place = |proxies: &Proxies, tls| {
            let proxy = proxies.of(tls, "huggingface.co", 443).unwrap()?;
            Some(format!(
                "{}:{} {}",
                proxy.host,
                proxy.port,
                proxy.login().trim_end()
            ))
        };
        let both = read(&[
            ("HTTPS_PROXY", "http://a:1"),
            ("https_proxy", "b:2/"),
            ("ALL_PROXY", "c"),
        ]);
        assert_eq!(place(&both, true).as_deref(), Some("b:2 "));
        assert_eq!(place(&both, false).as_deref(), Some("c:80 "));
        let login = read(&[("HTTPS_PROXY", "http://anna:p%40ss@proxy.lan:8080")]);
        let said = format!(
            "proxy.lan:8080 Proxy-Authorization: Basic {}",
            STANDARD.encode("anna:p@ss")
        );
        assert_eq!(place(&login, true), Some(said));
        assert_eq!(place(&login, false), None);
        for bad in [
            "socks5://a:secret@b:1",
            "https://a:1",
            "http://:8080",
            "http://a:x",
            "http://",
        ] {
            let proxies = read(&[("HTTPS_PROXY", bad)]);
            let error = proxies
                .of(true, "huggingface.co", 443)
                .err()
                .unwrap()
                .to_string();
            assert!(
                error.contains("HTTPS_PROXY") && error.contains("http://HOST:PORT"),
                "{error}"
            );
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn some_servers_are_excepted() {
        for (except, excepted) in [
            ("", false),
            ("*", true),
            ("huggingface.co", true),
            ("a.b, .huggingface.co", true),
            ("*.huggingface.co", true),
            ("HuggingFace.co:443", true),
            ("huggingface.co:80", false),
            ("face.co", false),
            ("cdn.huggingface.co", false),
        ] {
            assert_eq!(
                is_excepted(except, "huggingface.co", 443),
                excepted,
                "{except}"
            );
        }
        assert!(is_excepted("huggingface.co", "cdn-lfs.huggingface.co", 443));
        assert!(is_excepted("10.0.0.0/8", "10.1.2.3", 80));
        assert!(!is_excepted("10.0.0.0/8", "11.1.2.3", 80));
        assert!(is_excepted("0.0.0.0/0", "11.1.2.3", 80));
        assert!(is_excepted("::1", "[::1]", 80));
    }
}
