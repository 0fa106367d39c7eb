//! The program `flux-lora`: parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;
use flux_lora::cli::Cli;
use flux_lora::commands;
use flux_lora::nearest::{printable, sentence};

fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with 2 on bad usage
    let filter = tracing_subscriber::EnvFilter::new("warn,flux_lora=info");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .without_time()
        .init();
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", printable(&sentence(&error)));
            ExitCode::from(commands::exit_code(&error))
        }
    }
}
