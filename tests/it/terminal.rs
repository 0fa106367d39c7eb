//! What a person sees: the program on a pseudo terminal, which `script` of util-linux makes.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use flux_lora_tests::{Workbench, program};

/// Starts `flux-lora train` on a terminal of 60 columns; `interrupt` presses Ctrl-C when the training has begun. Back comes all
/// that was drawn.
fn drawn(bench: &Workbench, more: &[&str], interrupt: bool) -> String {
    let (config, run) = (bench.path("run.toml"), bench.path("run"));
    let train = format!(
        "stty rows 24 cols 60 && exec {} train {} --output {} {}",
        program().display(),
        config.display(),
        run.display(),
        more.join(" ")
    );
    let mut child = Command::new("script")
        .args(["--quiet", "--return", "--command", &train, "/dev/null"])
        .env("NO_COLOR", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start `script`, of util-linux");
    let mut keys = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    let (mut seen, mut piece, mut pressed) = (Vec::new(), [0; 4096], false);
    loop {
        let read = screen.read(&mut piece).unwrap_or(0);
        if read == 0 {
            break;
        }
        seen.extend(&piece[..read]);
        if interrupt && !pressed && String::from_utf8_lossy(&seen).contains("s/step") {
            keys.write_all(b"\x03").unwrap();
            pressed = true;
        }
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8_lossy(&seen).into_owned()
}

/// The lines that were drawn, one over the other or not, without what moves the cursor.
fn lines(drawn: &str) -> Vec<String> {
    let plain = |line: &str| {
        let mut rest = line.split("\x1b[");
        let first = rest.next().unwrap_or_default().to_string();
        rest.fold(first, |line, part| {
            let end = part.find(|c: char| c.is_ascii_alphabetic());
            line + end.map_or("", |end| &part[end + 1..])
        })
    };
    drawn.split(['\r', '\n']).map(plain).collect()
}

#[test]
fn bars_fit_into_a_narrow_terminal_and_have_no_colour_where_none_is_wanted() {
    let bench = Workbench::new();
    let drawn = drawn(&bench, &["--steps=30"], false);
    assert!(!drawn.contains("\x1b[3"), "{drawn}");
    let lines = lines(&drawn);
    let bars: Vec<&String> = lines.iter().filter(|line| line.contains('░')).collect();
    for bar in &bars {
        assert!(bar.chars().count() <= 60, "{bar}");
    }
    for shown in ["read images", "encode images", "train ", "s/step"] {
        assert!(
            bars.iter().any(|bar| bar.contains(shown)),
            "{shown}: {drawn}"
        );
    }
    let end = lines.iter().rfind(|line| line.contains("30/30")).unwrap();
    assert!(end.contains("loss ") && end.contains("s/step"), "{end}");
}

#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let bench = Workbench::new();
    let more = ["--steps=100000", "--set=checkpoint.every=100000"];
    let drawn = drawn(&bench, &more, true);
    let lines = lines(&drawn);
    let lines: Vec<&str> = lines
        .iter()
        .map(|line| line.trim())
        .filter(|line| !line.is_empty())
        .collect();
    let said = lines
        .iter()
        .position(|line| line.starts_with("stopped after step"))
        .expect(&drawn);
    // What is said is not behind a bar that was left.
    let before = drawn.split("stopped after step").next().unwrap();
    let left = before.rsplit_once("\x1b[2K").expect(&drawn).1;
    assert!(!left.contains('░'), "{left}");
    let resume = lines[said + 1];
    assert!(
        resume.contains(" train ") && resume.ends_with("--set=checkpoint.every=100000 --resume"),
        "{resume}"
    );
    assert_eq!(flux_lora_tests::checkpoints(&bench.path("run")).len(), 1);
}
