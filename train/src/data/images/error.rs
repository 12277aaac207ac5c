use std::path::PathBuf;

/// Error of images, their lists and their settings. Every message names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Image that cannot be used.
    #[error("{name}: {problem}; mend or remove it, or set data.images.skip_broken=true")]
    Broken {
        /// File, with a number where it holds several images.
        name: String,
        /// Problem.
        problem: String,
    },
    /// File or folder that is no set of images.
    #[error("{path}: {problem}")]
    Set {
        /// The file or folder.
        path: PathBuf,
        /// Problem and remedy.
        problem: String,
    },
    /// Settings of images that are not supported.
    #[error("{path}: {problem}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// Problem and remedy.
        problem: String,
    },
    /// Set without an image.
    #[error(
        "no image in {paths}; give folders DIR/class/*.png or *.jpg, JSON lines with \"image\" and \"label\", or IDX files"
    )]
    Empty {
        /// Paths that were searched.
        paths: String,
    },
}
