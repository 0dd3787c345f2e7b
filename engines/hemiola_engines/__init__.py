"""The engines stage of Hemiola: makes graphs runnable by a backend and packs what a service needs into a bundle."""
