// The API's description, drawn by Swagger UI from our own copy of it. Nothing is asked of another server.
const place = document.getElementById("api-docs");
window.SwaggerUIBundle({
  url: place.dataset.openapi,
  domNode: place,
  deepLinking: true,
  validatorUrl: null,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  tryItOutEnabled: false,
});
