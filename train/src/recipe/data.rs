//! Data of a run on text: training rows and held-out rows.

use lowrank_models::LanguageBatch;

use crate::build::{HeldOut, StageData};
use crate::data::Tokenizer;
use crate::objective::{Stream, TokenStream};

/// Training rows, held-out rows, and related data; clones share the rows.
#[derive(Clone)]
pub struct RunData {
    /// Training rows.
    pub train: TokenStream,
    /// Held-out rows.
    pub validation: TokenStream,
    /// Tokenizer of both.
    pub tokenizer: Tokenizer,
    /// Hash of all training data.
    pub fingerprint: String,
    /// Hash of the held-out data.
    pub held_out_fingerprint: String,
    /// Held-out text itself, if it is plain text.
    pub held_out: Option<HeldOut>,
    /// Start and end of a sample.
    pub sample: SampleStart,
    /// One-line description of the amount of data.
    pub description: String,
    /// Command that prompts the model in the form of its training data; see [`StageData::ask`].
    pub ask: String,
}

impl StageData<LanguageBatch> for RunData {
    fn train(&self) -> &dyn Stream<LanguageBatch> {
        &self.train
    }

    fn validation(&self) -> &dyn Stream<LanguageBatch> {
        &self.validation
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn held_out_fingerprint(&self) -> &str {
        &self.held_out_fingerprint
    }

    fn held_out(&self) -> Option<&HeldOut> {
        self.held_out.as_ref()
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn ask(&self) -> &str {
        &self.ask
    }
}

/// Start and end of a generated sample.
#[derive(Clone)]
pub struct SampleStart {
    /// Tokens before the first generated one.
    pub prompt: Vec<i32>,
    /// Tokens that end it.
    pub ends: Vec<i32>,
}
