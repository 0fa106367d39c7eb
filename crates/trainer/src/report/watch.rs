//! `flux-lora watch`: the page of a run, live, for a browser on this machine.
//!
//! Listens on 127.0.0.1 alone, answers GET and HEAD of a few fixed paths, and only where the `Host` header names this
//! machine: a page from elsewhere that has its own name point here (DNS rebinding) gets nothing.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Context;
use lora_core::files::digest::sha256_hex;
use lora_core::files::strict_json::read_file;
use serde_json::{Value, json};

use super::{MAX_PICTURE, data, open_run, parse_sample, served_samples, with_data};
use crate::run::folder::RunDir;

/// The port that is tried where none is asked for.
pub(crate) const PORT: u16 = 8765;
/// A request has a few hundred bytes.
const REQUEST_LIMIT: u64 = 16 << 10;
/// Nobody holds a connection open without a word for longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A page that waits for visitors.
pub(crate) struct Server {
    listener: TcpListener,
    run: RunDir,
    port: u16,
}

impl Server {
    /// Listens on `port`; where none is asked for on [`PORT`], or any that is free. A run that is still preparing is shown as that.
    ///
    /// # Errors
    /// A folder that is no run's, a port that is taken.
    pub(crate) fn bind(run: RunDir, port: Option<u16>) -> anyhow::Result<Self> {
        if !run.is_locked() {
            open_run(run.path())?;
        }
        let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let listener = match port {
            Some(port) => bind(port).with_context(|| format!("listen on port {port}"))?,
            None => bind(PORT).or_else(|_| bind(0)).context("listen")?,
        };
        let port = listener.local_addr().context("listen")?.port();
        Ok(Self {
            listener,
            run,
            port,
        })
    }

    /// Where the page is.
    pub(crate) fn address(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Answers until the process ends.
    pub(crate) fn serve(self) {
        for stream in self.listener.incoming().flatten() {
            let (run, port) = (self.run.clone(), self.port);
            // A browser that goes away in the middle is no fault.
            std::thread::spawn(move || answer(&stream, &run, port));
        }
    }
}

struct Answer {
    status: &'static str,
    kind: &'static str,
    etag: Option<String>,
    body: Vec<u8>,
}

impl Answer {
    fn refused(status: &'static str) -> Self {
        Self {
            status,
            kind: "text/plain",
            etag: None,
            body: format!("{status}\n").into_bytes(),
        }
    }

    fn of(kind: &'static str, body: Vec<u8>) -> Self {
        Self {
            status: "200 OK",
            kind,
            etag: None,
            body,
        }
    }
}

fn answer(mut stream: &TcpStream, run: &RunDir, port: u16) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = Vec::new();
    let mut lines = BufReader::new(stream.take(REQUEST_LIMIT));
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim_end().to_string();
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    let answer = respond(&head, run, port);
    let with_body = !head[0].starts_with("HEAD ") && !answer.status.starts_with("304");
    let etag = answer.etag.map(|etag| format!("ETag: {etag}\r\n"));
    write!(
        stream,
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n{}\r\n",
        answer.status,
        answer.kind,
        answer.body.len(),
        etag.unwrap_or_default()
    )?;
    if with_body {
        stream.write_all(&answer.body)?;
    }
    stream.flush()
}

fn respond(head: &[String], run: &RunDir, port: u16) -> Answer {
    let header = |name: &str| {
        head.iter().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    };
    let host = header("Host").unwrap_or_default();
    let here = ["127.0.0.1", "localhost", "[::1]"].map(|name| format!("{name}:{port}"));
    if !here.iter().any(|name| name.eq_ignore_ascii_case(host)) {
        return Answer::refused("403 Forbidden");
    }
    let mut words = head
        .first()
        .map(String::as_str)
        .unwrap_or_default()
        .split(' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    if !["GET", "HEAD"].contains(&method) {
        return Answer::refused("405 Method Not Allowed");
    }
    let answer = match path.split('?').next().unwrap_or_default() {
        "/" => {
            live(run).map(|data| Answer::of("text/html; charset=utf-8", with_data(&data).into()))
        }
        "/run.json" => live(run).map(|data| {
            let body = data.to_string().into_bytes();
            let etag = format!("\"{}\"", &sha256_hex(&body)[..32]);
            let known = header("If-None-Match") == Some(etag.as_str());
            Answer {
                status: if known { "304 Not Modified" } else { "200 OK" },
                etag: Some(etag),
                ..Answer::of("application/json", body)
            }
        }),
        path => return picture(path, run).unwrap_or_else(|| Answer::refused("404 Not Found")),
    };
    answer.unwrap_or_else(|error| Answer {
        body: format!("{error:#}\n").into_bytes(),
        ..Answer::refused("500 Internal Server Error")
    })
}

fn live(run: &RunDir) -> anyhow::Result<Value> {
    let mut data = data(run)?;
    data["live"] = json!(true);
    data["made"] = Value::Null;
    data["samples"] = served_samples(run).into();
    Ok(data)
}

/// A preview, by a name that only previews have: no path leads anywhere else.
fn picture(path: &str, run: &RunDir) -> Option<Answer> {
    let name = path.strip_prefix("/samples/")?;
    parse_sample(name)?;
    let path = run.samples_path().join(name);
    fs::symlink_metadata(&path)
        .ok()
        .filter(fs::Metadata::is_file)?;
    Some(Answer::of("image/png", read_file(&path, MAX_PICTURE).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn ask(port: u16, request: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn the_page_is_for_this_machine_alone_and_only_to_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        let config = "[model]\npath = \"/m/base\"\n[dataset]\npath = \"/d\"\n[sample]\nprompts = [\"a cat\"]\n";
        fs::write(run.config_path(), config).unwrap();
        fs::write(run.metrics_path(), "{\"step\":1,\"loss\":0.5}\n").unwrap();
        fs::create_dir(run.samples_path()).unwrap();
        fs::write(run.samples_path().join("step-0000001-0.png"), "picture").unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        let server = Server::bind(run.clone(), Some(0)).unwrap();
        let port = server.port;
        assert_eq!(server.address(), format!("http://127.0.0.1:{port}/"));
        std::thread::spawn(move || server.serve());

        let get = |path: &str| {
            ask(
                port,
                &format!("GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"),
            )
        };
        let page = get("/");
        assert!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
        assert!(page.contains("\"live\":true") && page.contains("a cat"));
        assert!(get("/samples/step-0000001-0.png").ends_with("\r\n\r\npicture"));
        for path in [
            "/secret",
            "/samples/../secret",
            "/samples/step-1-0.png/../../secret",
            "/config.toml",
        ] {
            let answer = get(path);
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
        }
        let answer = ask(
            port,
            &format!("GET / HTTP/1.1\r\nHost: evil.example:{port}\r\n\r\n"),
        );
        assert!(
            answer.starts_with("HTTP/1.1 403") && !answer.contains("base"),
            "{answer}"
        );
        let answer = ask(port, "GET / HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        let answer = ask(
            port,
            &format!("POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"),
        );
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");

        // Nothing new is not sent again.
        let first = get("/run.json");
        let etag = first
            .lines()
            .find_map(|line| line.strip_prefix("ETag: "))
            .unwrap()
            .to_string();
        let again = |etag: &str| {
            ask(
                port,
                &format!(
                    "GET /run.json HTTP/1.1\r\nHost: localhost:{port}\r\nIf-None-Match: {etag}\r\n\r\n"
                ),
            )
        };
        assert!(again(&etag).starts_with("HTTP/1.1 304"));
        fs::write(
            run.metrics_path(),
            "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.25}\n",
        )
        .unwrap();
        assert!(again(&etag).starts_with("HTTP/1.1 200"));
    }
}
