"""SwinV2: students and teachers up to three billion parameters."""
