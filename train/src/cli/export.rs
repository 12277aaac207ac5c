//! `lowrank export`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::peft::{Form, save_as};

use super::on_model::Adapters;
use super::output::print;
use super::{export_gguf, folder};
use crate::build::BuildError;
use crate::process::device;

/// Write a model as a dense Hugging Face folder or as a GGUF file, or an adapter as Python's peft reads it.
///
/// Factors and sparse parts are multiplied out; a parameterization with a non-linearity between its factors has no dense weight and is refused.
/// With --adapter, the adapter is written instead of the model: in the layout of peft if it has such a structure, or as the plain LoRA that it
/// equals; others are refused. With --format gguf, tokenizer and chat template of a model go into the file.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank export --model runs/pretrain-001/checkpoints/step-001800 --out model-dense
  lowrank export --model SmolLM2-135M --adapter runs/SmolLM2-135M-vera-001/checkpoints/step-000300 --out adapter
  lowrank export --model merged --format gguf --dtype q8_0 --out merged-q8_0.gguf
  lowrank export --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --format gguf --out lora.gguf")]
pub struct Args {
    /// Checkpoint or model folder, or GGUF file
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Form of the result
    #[arg(long, value_enum, default_value_t = Format::Folder)]
    format: Format,
    /// Type of the weights of a folder: f32, f16 or bf16; when not given, each has the type that it has in the model's files. Type of the matrices
    /// in a GGUF file: also q8_0, q5_1, q5_0, q4_1 or q4_0; f32 when not given
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    #[command(flatten)]
    adapters: Adapters,
    /// Folder or file to write; it must not exist yet
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

/// Form of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Hugging Face folder
    Folder,
    /// File of llama.cpp
    Gguf,
}

/// Reads the model, multiplies factors out, and writes the folder under a temporary name before renaming it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    if args.format == Format::Gguf {
        match args.adapters.is_empty() {
            true => export_gguf::model(&args.model, args.dtype.as_deref(), &args.out)?,
            false => export_gguf::adapter(&args.model, &args.adapters, args.dtype.as_deref(), &args.out)?,
        }
        print(&format!("{}\n", args.out.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(dtype), false) = (&args.dtype, args.adapters.is_empty()) {
        let problem = format!("--dtype {dtype}: adapters are written in f32; leave it out");
        return Err(BuildError::Settings(problem).into());
    }
    let dtype = args.dtype.as_deref().map(folder::file_type).transpose()?;
    let device = device("cpu").map_err(BuildError::from)?;
    if let [adapter, more @ ..] = args.adapters.paths() {
        if !more.is_empty() {
            let problem =
                "--adapter is given several times, and a folder holds one; export them one by one, or merge them";
            return Err(BuildError::Settings(problem.into()).into());
        }
        let model = ModelFolder::open(&args.model).and_then(|from| from.load(&device)).map_err(BuildError::from)?;
        let model = args.adapters.on(model)?;
        let (name, base) = (adapter.to_string_lossy(), args.model.to_string_lossy());
        folder::whole(&args.out, |dir| {
            Ok(save_as(&model, &name, "default", Form::Peft, Some(&base), dir).map_err(BuildError::from)?)
        })?;
        print(&format!("{}\n", args.out.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let from = ModelFolder::open(&args.model).map_err(BuildError::from)?;
    let model = from.load(&device).map_err(BuildError::from)?.to_dense(&device).map_err(BuildError::from)?;
    folder::write(&model, &from, &args.model, dtype, &args.out)?;
    print(&format!("{}\n", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}
