"""The export stage of Hemiola: opens a diffusers model at its seams and writes its forwards as ONNX graphs."""
