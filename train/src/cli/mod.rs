//! The commands of the program.

mod adapter_start;
mod adapters;
mod align;
mod chat;
mod compare;
mod compose;
mod config;
mod dry_run;
mod embed;
mod eval;
mod eval_examples;
mod eval_images;
mod export;
mod export_adapter;
mod export_gguf;
mod finetune;
mod folder;
mod generate;
mod inspect;
mod merge;
mod methods;
mod on_model;
mod output;
mod plan;
mod pretrain;
mod revert;
mod sampling;
mod tokenize;
mod training;
mod vision_folder;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lowrank_kernels::instructions::check_environment;

use crate::build::BuildError;
use crate::process::{Peers, Session};
use crate::run::RunError;

/// Low-rank training on Burn: pretrain and fine-tune small LLaMA-style models and vision transformers in little memory.
#[derive(Debug, Parser)]
#[command(name = "lowrank", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(pretrain::Args),
    Finetune(finetune::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Tokenize(tokenize::Args),
    Eval(eval::Args),
    Embed(embed::Args),
    Align(align::Args),
    Inspect(inspect::Args),
    Export(export::Args),
    Merge(merge::Args),
    Compose(compose::Args),
    Revert(revert::Args),
    AdapterStart(adapter_start::Args),
    Methods(methods::Args),
    Config(config::Args),
    Plan(plan::Args),
    Compare(compare::Args),
    Adapters(adapters::Args),
}

/// Parses the arguments of the process, runs the command and reports errors.
///
/// Exit codes: 0 done, 2 bad input (arguments, configuration, data, files), 1 a failure while working, 130 and 143 stopped by SIGINT and SIGTERM
/// with everything saved.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = check_environment() {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let (trains, compares) = match cli.command {
        Command::Pretrain(_) | Command::Finetune(_) => (true, false),
        Command::Compare(_) => (false, true),
        _ => (false, false),
    };
    // Other commands write no run folder and stay as they are below a launcher.
    let _session = match (trains || compares).then(|| Session::begin(trains)).transpose() {
        Ok(session) => session,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    together(|| run(cli.command))
}

/// Runs the work of this process. If it fails, all processes that train together end, since they would wait for ever.
fn together(work: impl FnOnce() -> anyhow::Result<ExitCode>) -> ExitCode {
    let peers = Peers::of_process();
    if peers.is_alone() {
        return finish(work());
    }
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let code = match done {
        Ok(Ok(code)) => return code,
        Ok(Err(error)) => {
            if !peers.is_first() {
                // An error that all processes have is reported by the first, which then ends the others.
                std::thread::sleep(WAIT_FOR_FIRST);
                eprint!("rank {} of {}: ", peers.rank(), peers.size());
            }
            let input = is_input(&error);
            finish(Err(error));
            if input { 2 } else { 1 }
        }
        Err(_) => 101,
    };
    peers.abort(code);
    ExitCode::from(code as u8)
}

/// Time that the first process has to report an error before the others do.
const WAIT_FOR_FIRST: std::time::Duration = std::time::Duration::from_secs(3);

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Pretrain(args) => pretrain::run(args),
        Command::Finetune(args) => finetune::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Embed(args) => embed::run(args),
        Command::Align(args) => align::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Export(args) => export::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Compose(args) => compose::run(args),
        Command::Revert(args) => revert::run(args),
        Command::AdapterStart(args) => adapter_start::run(args),
        Command::Methods(args) => methods::run(args),
        Command::Config(args) => config::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Adapters(args) => adapters::run(args),
    }
}

/// Exit code of a command, whose error is reported.
fn finish(done: anyhow::Result<ExitCode>) -> ExitCode {
    match done {
        Ok(code) => code,
        // The reader of our output has seen enough: this is not a failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::from(if is_input(&error) { 2 } else { 1 })
        }
    }
}

/// Returns true if the cause is the input rather than a failure while working.
fn is_input(error: &anyhow::Error) -> bool {
    error.downcast_ref::<BuildError>().is_some_and(BuildError::is_input)
        || error.downcast_ref::<RunError>().is_some_and(RunError::is_input)
}

/// Error message with its causes, without those that the message already contains.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    #[test]
    fn every_flag_of_a_command_has_one_meaning() {
        let mut cli = super::Cli::command();
        // Its own checks are compiled in debug builds alone.
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            let mut seen = BTreeSet::new();
            for argument in command.get_arguments() {
                let names = [
                    Some(argument.get_id().as_str()),
                    argument.get_long().filter(|long| *long != argument.get_id().as_str()),
                ];
                for name in names.into_iter().flatten() {
                    assert!(seen.insert(name.to_string()), "{} has {name} twice", command.get_name());
                }
                assert!(argument.get_help().is_some(), "{} {} has no help", command.get_name(), argument.get_id());
            }
        }
    }
}
