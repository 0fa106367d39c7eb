//! The program `flux-lora`: parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;
use flux_lora::cli::Cli;
use flux_lora::commands;
use flux_lora::heap::keep_freed_memory;
use flux_lora::nearest::{printable, sentence};
use flux_lora::output::OutputError;

fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with 2 on bad usage
    if cli.command.runs_networks() {
        keep_freed_memory();
    }
    let output = cli.output();
    output.init();
    match commands::run(cli.command, output) {
        Ok(code) => code,
        Err(error) if matches!(error.downcast_ref(), Some(OutputError::Closed)) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            output.error(&printable(&sentence(&error)));
            ExitCode::from(commands::exit_code(&error))
        }
    }
}
