//! `lowrank export`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lowrank_models::hub::{FileType, ModelFolder};

use super::on_model::Adapters;
use super::output::print;
use super::{export_adapter, export_gguf, folder};
use crate::build::BuildError;
use crate::process::device;

/// Write a model as a dense Hugging Face folder or as a GGUF file, or an adapter as Python's peft or llama.cpp reads it.
///
/// Factors and sparse parts are multiplied out; a parameterization with a non-linearity between its factors has no dense weight and is refused.
/// With --format gguf, tokenizer and chat template of a model go into the file.
///
/// With --adapter, the adapter is written instead of the model: in the layout of peft if it has such a structure, or as the plain LoRA that it
/// equals; others are refused. With --as lora, any update becomes a plain LoRA of a rank, by truncated singular value
/// decompositions; with --as shira, one that has few non-zero elements, such as that of snell, becomes peft's SHiRA, exactly; with --as adalora, one
/// of the allocations adalora and increlora becomes peft's AdaLoRA with the components that are left. An adapter whose update depends on the weights
/// needs its model.
#[derive(Debug, clap::Args)]
#[command(mut_arg("rank", |rank| rank.help(
    "Rank of the adapter converted with --as; without it the rank, from 1 to their own, at which adapters trained by the allocation dylora are written"
)))]
#[command(after_help = "Examples:
  lowrank export --model runs/pretrain-001/checkpoints/step-001800 --out model-dense
  lowrank export --model SmolLM2-135M --adapter runs/SmolLM2-135M-vera-001/checkpoints/step-000300 --out adapter
  lowrank export --model merged --format gguf --dtype q8_0 --out merged-q8_0.gguf
  lowrank export --model SmolLM2-135M --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300 --format gguf --out lora.gguf
  lowrank export --adapter runs/SmolLM2-135M-nola-001/checkpoints/step-000300 --out for-peft
  lowrank export --adapter dora --model SmolLM2-135M --as lora --rank 16 --out plain
  lowrank export --adapter runs/SmolLM2-135M-snell-001/checkpoints/step-000300 --model SmolLM2-135M --as shira --out sparse")]
pub struct Args {
    /// Checkpoint or model folder, or GGUF file; with --adapter the model that it is attached to
    #[arg(long, value_name = "DIR", required_unless_present = "dirs")]
    model: Option<PathBuf>,
    /// Form of the result
    #[arg(long, value_enum, default_value_t = Format::Folder)]
    format: Format,
    /// Type of the weights of a folder: f32, f16 or bf16; when not given, each has the type that it has in the model's files. Type of the matrices
    /// in a GGUF file: also q8_0, q5_1, q5_0, q4_1 or q4_0; f32 when not given
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    #[command(flatten)]
    adapters: Adapters,
    /// Structure to convert the adapter to
    #[arg(long = "as", value_name = "NAME", requires = "dirs", value_enum)]
    convert: Option<Convert>,
    /// Print the residual of each layer of a converted adapter as JSON
    #[arg(long, requires = "convert")]
    json: bool,
    /// Folder or file to write; it must not exist yet
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

/// Structure that an adapter is converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Convert {
    /// Plain LoRA of --rank
    Lora,
    /// Sparse values at their positions
    Shira,
    /// Components with a value each, those that are left
    Adalora,
}

impl Convert {
    fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Shira => "shira",
            Self::Adalora => "adalora",
        }
    }
}

/// Form of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Hugging Face folder
    Folder,
    /// File of llama.cpp
    Gguf,
}

/// Writes the folder or file under a temporary name before renaming it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    folder::refuse_existing(&args.out)?;
    let settings = |problem: String| Err(BuildError::Settings(problem).into());
    let dtype = args.dtype.as_deref();
    if args.format == Format::Gguf {
        if let Some(convert) = args.convert {
            return settings(format!(
                "--as {}: a converted adapter is a folder; leave out --format gguf, and export the folder after that",
                convert.name()
            ));
        }
        let Some(model) = &args.model else {
            return settings(
                "--format gguf: an adapter in a GGUF file needs the model that it is attached to: add --model".into(),
            );
        };
        match args.adapters.is_empty() {
            true => export_gguf::model(model, dtype, &args.out)?,
            false => export_gguf::adapter(model, &args.adapters, dtype, &args.out)?,
        }
        print(&format!("{}\n", args.out.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let dtype = dtype.map(folder::file_type).transpose()?;
    if let Some(dtype) = args.dtype.as_ref().filter(|_| !args.adapters.is_empty()) {
        return settings(format!("--dtype {dtype}: adapters are written in f32; leave it out"));
    }
    let model = args.model.as_deref();
    let text = match (args.adapters.paths(), model, args.convert) {
        ([], Some(model), _) => {
            dense(model, dtype, &args.out)?;
            String::new()
        }
        ([], None, _) => unreachable!("a model or an adapter is required"),
        ([adapter], model, Some(Convert::Lora)) => match args.adapters.rank {
            Some(rank) => export_adapter::as_lora(adapter, model, rank, args.json, &args.out)?,
            None => return settings("--as lora: add --rank, the rank of the result".into()),
        },
        ([adapter], Some(model), Some(convert)) => {
            if args.adapters.rank.is_some() || args.json {
                let problem =
                    format!("--as {}: leave out --rank and --json; nothing is left out of the update", convert.name());
                return settings(problem);
            }
            match convert {
                Convert::Adalora => export_adapter::as_adalora(adapter, model, &args.out)?,
                _ => export_adapter::as_shira(adapter, model, &args.out)?,
            }
            String::new()
        }
        ([_], None, Some(convert)) => {
            return settings(format!(
                "--as {}: add --model, the model that the adapter is attached to",
                convert.name()
            ));
        }
        ([adapter], Some(model), None) => {
            export_adapter::with_model(&args.adapters, adapter, model, &args.out)?;
            String::new()
        }
        ([adapter], None, None) => {
            export_adapter::alone(adapter, &args.out)?;
            String::new()
        }
        (several, ..) => {
            let count = several.len();
            return settings(format!(
                "--adapter is given {count} times; export one, or make them into one with `lowrank compose`"
            ));
        }
    };
    print(&if args.json { text } else { format!("{text}{}\n", args.out.display()) })?;
    Ok(ExitCode::SUCCESS)
}

/// Reads the model, multiplies factors out, and writes the folder.
fn dense(model: &Path, dtype: Option<FileType>, out: &Path) -> anyhow::Result<()> {
    let device = device("cpu").map_err(BuildError::from)?;
    let from = ModelFolder::open(model).map_err(BuildError::from)?;
    let dense = from.load(&device).map_err(BuildError::from)?.to_dense(&device).map_err(BuildError::from)?;
    folder::write(&dense, &from, model, dtype, out)
}
