//! Metrics and TensorBoard of a run. A failure to write is reported once and never stops the training.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_optim::{Assignment, ModulePath};

use super::metrics::Layers;
use super::tensorboard::{TensorBoard, first_step};
use super::{Console, Metrics, MetricsFile};
use crate::build::Listener;
use crate::config::Config;
use crate::data::images::Picture;
use crate::run::RunFolder;

/// Logs of a run; none by default.
#[derive(Default)]
pub struct Logs {
    metrics: Option<MetricsFile>,
    board: Option<TensorBoard>,
    /// Ranks by layer as they were last written.
    layers: Option<Layers>,
}

impl Logs {
    /// Opens the logs of a run that continues after `step`.
    pub fn open(folder: &RunFolder, config: &Config, step: u64, console: &Console) -> Self {
        let metrics = or_warning(MetricsFile::open(&folder.join("metrics.jsonl"), step), "metrics.jsonl", console);
        let board = config.log.tensorboard.then(|| TensorBoard::create(&folder.join("tensorboard"), step));
        let board = board.and_then(|board| or_warning(board, "TensorBoard events", console));
        let mut logs = Self { metrics, board, layers: None };
        let entries = config.entries();
        logs.board(console, |board| {
            // Starts at the first new step, so that a second resume from the same checkpoint hides the texts of the
            // first.
            let step = first_step(step);
            board.text("config", step, &format!("```toml\n{}```\n", config.to_toml()))?;
            let name = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            board.hyper_parameters(step, &name, entries.iter().map(|(key, value)| (key.as_str(), value.as_str())))
        });
        logs
    }

    /// The ranks by layer, if they are others than those of the last call.
    pub fn changed(&mut self, layers: Option<Layers>) -> Option<Layers> {
        if self.layers == layers {
            return None;
        }
        self.layers.clone_from(&layers);
        layers
    }

    /// Writes a line of metrics.
    pub fn write(&mut self, metrics: &Metrics, console: &Console) {
        if let Some(file) = &mut self.metrics
            && or_warning(file.write(metrics), "metrics.jsonl", console).is_none()
        {
            self.metrics = None;
        }
        self.board(console, |board| {
            for (tag, value) in metrics.scalars() {
                board.scalar(tag, metrics.step, value)?;
            }
            for (tag, value) in metrics.layer_scalars() {
                board.scalar(&tag, metrics.step, value)?;
            }
            match &metrics.layers {
                Some(layers) if !layers.is_empty() => {
                    let ranks: Vec<f32> = layers.values().map(|layer| layer.rank as f32).collect();
                    board.histogram("rank/all", metrics.step, &ranks)
                }
                _ => Ok(()),
            }
        });
    }

    /// Logs the assignment of each parameter to an optimizer.
    pub fn parameters(&mut self, step: u64, parameters: &[Assignment], console: &Console) {
        let lines: String = parameters.iter().map(|stepped| format!("{stepped}\n")).collect();
        let text = format!("```\n{lines}```\n");
        self.board(console, |board| board.text("optimizer", first_step(step), &text));
    }

    /// Logs a generated text.
    pub fn sample(&mut self, step: u64, text: &str, console: &Console) {
        self.board(console, |board| board.text("sample", step, &format!("```\n{text}\n```\n")));
    }

    /// Logs pictures by their tags.
    pub fn pictures(&mut self, step: u64, pictures: &[(&'static str, Picture)], console: &Console) {
        self.board(console, |board| pictures.iter().try_for_each(|(tag, picture)| board.picture(tag, step, picture)));
    }

    /// Logs histograms of all weights and gradients.
    pub fn histograms<M: Module>(&mut self, step: u64, model: &M, grads: &GradientsParams, console: &Console) {
        self.board(console, |board| {
            let mut visitor = Histograms { board, grads, step, path: ModulePath::default(), written: Ok(()) };
            model.visit(&mut visitor);
            visitor.written
        });
    }

    fn board(&mut self, console: &Console, write: impl FnOnce(&mut TensorBoard) -> std::io::Result<()>) {
        if let Some(board) = &mut self.board {
            let written = write(board).and_then(|()| board.flush());
            if or_warning(written, "TensorBoard events", console).is_none() {
                self.board = None;
            }
        }
    }
}

fn or_warning<T>(result: std::io::Result<T>, what: &str, console: &Console) -> Option<T> {
    result
        .inspect_err(|error| console.warn(&format!("{what} cannot be written, training goes on without: {error}")))
        .ok()
}

struct Histograms<'a> {
    board: &'a mut TensorBoard,
    grads: &'a GradientsParams,
    step: u64,
    path: ModulePath,
    written: std::io::Result<()>,
}

impl ModuleVisitor for Histograms<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.joined();
        for (kind, tensor) in [("weights", Some(param.val().inner())), ("gradients", self.grads.get::<D>(param.id))] {
            let Some(tensor) = tensor else { continue };
            let data = tensor.into_data().convert::<f32>();
            // A non-finite gradient is rejected by the engine, not by the logger.
            let Some(values) =
                data.as_slice::<f32>().ok().filter(|values| values.iter().all(|value| value.is_finite()))
            else {
                continue;
            };
            if self.written.is_ok() {
                self.written = self.board.histogram(&format!("{kind}/{path}"), self.step, values);
            }
        }
    }
}
